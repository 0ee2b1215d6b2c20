"""Frozen weights: products on a copy in oneDNN's layout, which follows what PyTorch counts."""

import copy
import importlib
import io
import sys
import threading
from pathlib import Path

import pytest
import torch
from models import B, S, ids_of, masks, stock_model, tokens
from torch.multiprocessing.reductions import StorageWeakRef

import bert_fast
from bert_fast import encoder, frozen
from bert_fast.kernels import launch
from bert_fast.kernels.launch import DTYPES, INTERPRET
from bert_fast.kernels.linear import SPEC as LINEAR
from bert_fast.kernels.linear import prepack, prepacked_linear

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))
from judge import Judge

pytestmark = pytest.mark.skipif(
    INTERPRET or prepack(torch.ones(128, 128)) is None, reason="oneDNN has no part in this torch"
)
NAMES = ["BertModel", "RobertaModel", "ElectraModel", "DistilBertModel"]
linear_file = importlib.import_module("bert_fast.kernels.linear")


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch):
    """As with AVX-512; without, only short inputs run on the copy."""
    monkeypatch.setattr(launch, "AVX512", True)


@torch.no_grad()
def test_the_copy_goes_where_weights_leave_the_cpu():
    _, model = pair()
    model(ids_of())
    part = model.encoder.layer[0].intermediate.dense
    assert part.__dict__[frozen.NAME]._kept[0] is not None
    assert frozen.prepacked([part], torch.empty(2, 128, device="meta")) is None
    assert part.__dict__[frozen.NAME]._kept[0] is None


@torch.no_grad()
def test_without_avx512_short_inputs_alone_run_on_the_copy(made, monkeypatch):
    monkeypatch.setattr(launch, "AVX512", False)
    _, model = pair()
    model(ids_of(shape=(2, linear_file.FEW // 2)))
    used = made["used"]
    assert used > 0
    model(ids_of(shape=(1, linear_file.FEW + 1)))
    assert made["used"] == used


def pair(name="BertModel", **changes):
    """A model, and the same with frozen weights; large enough for oneDNN."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "embedding_size": 128}
    if name != "ElectraModel":
        del sizes["embedding_size"]
    plain = bert_fast.accelerate(stock_model(name, **sizes, **changes))
    return plain, bert_fast.accelerate(copy.deepcopy(plain), frozen=True)


@pytest.fixture
def made(monkeypatch):
    """The shapes of the weights that were brought into oneDNN's layout, and of those used."""
    shapes = {"packed": [], "used": 0}

    def counting(weight):
        shapes["packed"].append(tuple(weight.shape))
        return prepack(weight)

    def using(*args):
        shapes["used"] += 1
        return prepacked_linear(*args)

    monkeypatch.setattr(frozen, "prepack", counting)
    monkeypatch.setattr(encoder, "prepacked_linear", using)
    return shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_hidden_states_are_as_close_to_stock_as_without(name, dtype):
    plain, model = pair(name)
    exact = bert_fast.restore(copy.deepcopy(plain)).double()
    plain, model = plain.to(dtype), model.to(dtype)
    for kind, mask in masks().items():
        if kind in ("all zeros", "a row of zeros"):
            continue
        truth = exact(ids_of(), mask).last_hidden_state
        there = tokens(mask, "cpu")
        ours, theirs = (
            (m(ids_of(), mask).last_hidden_state.double() - truth)[there].abs().max()
            for m in (model, plain)
        )
        assert ours <= 1.2 * theirs + 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_each_weight_is_brought_into_the_layout_once(made):
    _, model = pair()
    for _ in range(3):
        model(ids_of(), masks()["right"])
    layer = [(384, 128), (128, 128), (192, 128), (128, 192)]
    assert made == {"packed": 2 * layer, "used": 3 * 2 * 4}


@torch.no_grad()
def test_a_row_and_no_row():
    plain, model = pair()
    one = torch.tensor([[7]])
    torch.testing.assert_close(model(one)[0], plain(one)[0], rtol=1e-5, atol=1e-5)
    zeros = torch.zeros(B, S, dtype=torch.long)
    assert torch.equal(model(ids_of(), zeros)[0], torch.zeros(B, S, 128))


def loaded(model):
    model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()})


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(ids_of()).pooler_output.sum().backward()
    optimizer.step()
    model.zero_grad()


def written(model):
    model.encoder.layer[0].attention.self.key.weight.mul_(2)  # the second of three that are one


def pointed_elsewhere(model):
    weight = model.encoder.layer[1].output.dense.weight
    weight.data = 2 * weight.data


def another_parameter(model):
    dense = model.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(2 * dense.weight)


def another_module(model):
    dense = torch.nn.Linear(192, 128)
    for p in dense.parameters():
        p.fill_(0.01)
    model.encoder.layer[1].output.dense = dense


def another_dtype(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [loaded, stepped, written, pointed_elsewhere, another_parameter, another_module,
               another_dtype],
)  # fmt: skip
def test_a_change_that_pytorch_counts_is_followed(change):
    plain, model = pair()
    with torch.no_grad():
        before = model(ids_of())[0]
        for m in (plain, model):
            change(m)
        ours, theirs = model(ids_of())[0], plain(ids_of())[0]
    assert not torch.allclose(before.float(), theirs.float(), rtol=0.01, atol=0.01)
    eps = 100 * torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=eps, atol=eps)


def test_gradients_do_not_go_through_the_copy(made):
    plain, model = pair()
    for m in (plain, model):
        m(ids_of()).last_hidden_state.square().sum().backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        assert torch.equal(p.grad, q.grad) if p.grad is not None else q.grad is None
    assert not made["used"]


@torch.no_grad()
def test_no_other_weight_gets_the_memory_of_one_while_there_is_a_copy_of_it():
    """Such a weight would be taken for the first: at the same place, and never written to."""
    plain, model = pair()
    model(ids_of())
    ours, theirs = (m.encoder.layer[0].attention.output.dense for m in (model, plain))
    memory = StorageWeakRef(ours.weight.untyped_storage())
    ours.to("meta")
    assert not memory.expired()
    weights = {"weight": torch.full((128, 128), 0.01), "bias": torch.ones(128)}
    ours.load_state_dict(weights, assign=True)
    theirs.load_state_dict(weights)
    torch.testing.assert_close(model(ids_of())[0], plain(ids_of())[0], rtol=1e-4, atol=1e-4)
    assert memory.expired()


@torch.no_grad()
def test_without_onednn_it_is_not_asked(made):
    plain, model = pair()
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(model(ids_of())[0], plain(ids_of())[0])
    small = bert_fast.accelerate(stock_model(), frozen=True)  # weights for which it is too slow
    small(ids_of())
    with torch.inference_mode():
        written_there = bert_fast.accelerate(stock_model(hidden_size=128), frozen=True)
        written_there(ids_of())
    assert not made["used"]


@torch.no_grad()
def test_under_torch_compile_weights_are_arguments_as_ever(made):
    plain, model = pair()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    mask = masks()["right"]
    torch.testing.assert_close(compiled(ids_of(), mask)[0], plain(ids_of(), mask)[0])
    assert not made["used"]


def test_copies_and_files_are_frozen_and_start_anew(made):
    _, model = pair()
    file = io.BytesIO()
    with torch.no_grad():
        expected = model(ids_of())[0]
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            before = len(made["packed"])
            assert torch.equal(other(ids_of())[0], expected)
            assert len(made["packed"]) == before + 8
    names = bert_fast.restore(copy.deepcopy(model)).state_dict().keys()
    assert model.state_dict().keys() == names


def test_accelerate_freezes_and_thaws_and_restore_keeps_no_copy():
    _, model = pair()
    assert "weights are frozen" in str(bert_fast.report(model))
    assert bert_fast.report(model).swapped[0].frozen
    bert_fast.accelerate(model, cuda_graphs=False)
    assert bert_fast.report(model).swapped[0].frozen  # as it was
    bert_fast.accelerate(model, frozen=False)
    assert not bert_fast.report(model).swapped[0].frozen
    assert "frozen" not in str(bert_fast.report(model))
    bert_fast.accelerate(model, frozen=True)
    bert_fast.restore(model)
    assert not any(frozen.NAME in vars(m) for m in model.modules())


def test_a_step_of_a_fused_optimizer_is_noticed():
    """transformers' Trainer takes a fused one. PyTorch does not count what it writes."""
    plain, model = pair()
    with torch.no_grad():
        model(ids_of())
    for m in (plain, model):
        m(ids_of())[0].square().sum().backward()
        torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        ours, theirs = model(ids_of())[0], plain(ids_of())[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_an_evaluation_before_a_fused_step_leaves_no_old_copy():
    plain, model = pair()
    for m in (plain, model):
        m(ids_of())[0].square().sum().backward()
        with torch.no_grad():
            m(ids_of())
        torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()
        m.zero_grad()
    with torch.no_grad():
        ours, theirs = model(ids_of())[0], plain(ids_of())[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_what_was_written_while_stock_ran_is_noticed():
    """As adapters are merged, through .data."""
    plain, model = pair()
    with torch.no_grad():
        model(ids_of())
        for m in (plain, model):
            hook = m.encoder.layer[0].register_forward_hook(lambda *args: None)
            m(ids_of())
            hook.remove()
            m.encoder.layer[0].output.dense.weight.data.mul_(2)
        ours, theirs = model(ids_of())[0], plain(ids_of())[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_threads_share_a_copy():
    plain, model = pair()
    with torch.no_grad():
        expected = plain(ids_of())[0]
    results = []

    def work():
        with torch.no_grad():
            results.extend(model(ids_of())[0] for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["", "gelu", "residual"])
@pytest.mark.parametrize("T", [1, 2, 17, 129])
@torch.no_grad()
def test_a_product_is_that_of_linear(T, form, dtype):
    torch.manual_seed(0)
    case = {"T": T, "K": 131, "N": 257, "gelu": "gelu" in form, "residual": "residual" in form}
    inputs = LINEAR.inputs(dtype, "cpu", **case)
    if (packed := prepack(inputs["weight"])) is None:
        pytest.skip(f"this CPU's oneDNN has no products of {dtype}")
    rest = (inputs[name] for name in ("bias", "activation", "residual"))
    share, _ = Judge(LINEAR, inputs, dtype)(prepacked_linear(inputs["x"], packed, *rest))
    assert share <= 1
