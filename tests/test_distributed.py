"""Models spread over processes: DistributedDataParallel, FullyShardedDataParallel, fully_shard."""

import copy
import sys

import pytest
import torch
from models import assert_ran_stock, ids_of, masks, stock_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bert_fast
from bert_fast.kernels.launch import INTERPRET

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="nothing here is of a kernel"),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="starts processes as on Linux"),
]
PROCESSES = 2


def gradients_of(model, inner, rank):
    """Of one step, in which each process has a batch of its own."""
    ids, mask = ids_of().roll(rank, dims=1), masks()["right"]
    model(ids, mask)[0][mask.bool()].square().sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


def averages_gradients_as_stock_does(rank):
    stock = stock_model()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    ours = gradients_of(DistributedDataParallel(fast), fast, rank)
    theirs = gradients_of(DistributedDataParallel(stock), stock, rank)
    assert bert_fast.report(fast).swapped[0].fast_calls == 1
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def flat_weights_are_whole_in_calls(rank):
    fast = bert_fast.accelerate(stock_model())
    expected = fast(ids_of(), masks()["right"])[0]
    calls = bert_fast.report(fast).swapped[0].fast_calls
    sharded = FullyShardedDataParallel(fast, use_orig_params=True, device_id=torch.device("cpu"))
    assert torch.equal(sharded(ids_of(), masks()["right"])[0], expected)
    (found,) = bert_fast.report(sharded).swapped
    assert found.fast_calls == calls + 1
    assert "flat weights, as FullyShardedDataParallel keeps them" in found.reason


@torch.no_grad()
def layers_of_fully_shard_run_stock_and_are_named(rank):
    stock = stock_model()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    mesh = init_device_mesh("cpu", (PROCESSES,))  # a GPU, if there is one, has no part in it
    for layer in fast.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(fast, mesh=mesh)
    ours = fast(ids_of(), masks()["right"])[0]
    assert_ran_stock(fast, "FSDPBertLayer")
    assert torch.equal(ours, stock(ids_of(), masks()["right"])[0])
    with pytest.raises(ValueError, match="FSDPBertModel, made of bert_fast's BertModel"):
        bert_fast.restore(fast)


def run(rank, place):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=PROCESSES
    )
    averages_gradients_as_stock_does(rank)
    flat_weights_are_whole_in_calls(rank)
    layers_of_fully_shard_run_stock_and_are_named(rank)
    distributed.destroy_process_group()


def test_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(run, (tmp_path / "store",), PROCESSES)
