"""Training with dropout: what is drawn, and models against stock with the same draws."""

import copy
import itertools
import math
import sys

import pytest
import torch
from models import B, S, assert_ran_fast, fast_calls, ids_of, masks, stock_model, tokens
from torch.nn import functional as F

import bert_fast
from bert_fast.kernels.dropout import kept, new_seeds
from bert_fast.kernels.launch import INTERPRET

MODELS, MASKS = ["BertModel"], ["right"]
if not INTERPRET:  # slow, and the kernels are the same in all
    MODELS += ["RobertaModel", "ElectraModel", "DistilBertModel"]
    MASKS += ["none", "holes"]
SEEDS = [torch.tensor([n]) for n in (5, -1, 2**40, 3, 0, 77, 123456789, 10, 2**62)]


# -- draws ----------------------------------------------------------------------------------
def drawn(seed, p=0.5, rows=4096, columns=768):
    rows, columns = (torch.arange(n, dtype=torch.int32) for n in (rows, columns))
    return kept(torch.tensor([seed]), rows[:, None], columns, p)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_p_says(p):
    """Within four standard deviations, in all and on average of each row and each column."""
    kept = drawn(7, p=p).double()
    apart = (kept.mean() - (1 - p)) / math.sqrt(p * (1 - p))
    assert abs(apart) * math.sqrt(kept.numel()) < 4
    for dim in (0, 1):
        n, count = kept.shape[dim], kept.shape[1 - dim]
        chi2 = (kept.mean(dim) - (1 - p)).square().sum() * n / (p * (1 - p))
        assert abs(chi2 - count) < 4 * math.sqrt(2 * count + count / (n * p * (1 - p)))


def test_0_drops_nothing_and_1_everything():
    assert drawn(7, p=0).all()
    assert not drawn(7, p=1).any()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_neighbours_are_independent(seed):
    """Places that lie 1, 2, 16 or 64 rows or columns apart, and the same place under another seed:
    as often alike as not, within five standard deviations."""
    here = drawn(seed)
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (16, 0), (64, 16)):
        one, other = here[rows:, columns:], here[: len(here) - rows, : here.shape[1] - columns]
        assert_independent(one, other)
    for further in (1, 2, 2**31, 2**32, 2**32 + 1):
        assert_independent(here, drawn(seed + further))


def test_seeds_with_close_starts_share_no_rows():
    """Of a hundred dropouts of many rows, two are likely to have such seeds."""
    first = mixed(mixed(0) + 7) + 5
    seed = (unmixed(first) - mixed(0)) % 2**32
    assert mixed(mixed(0) + seed) == first
    assert_independent(drawn(7)[5:], drawn(seed)[:-5])


def mixed(x):
    x %= 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def unmixed(x):
    x %= 2**32
    x = (x ^ x >> 16) * pow(0x846CA68B, -1, 2**32) % 2**32
    x = (x ^ x >> 15 ^ x >> 30) * pow(0x7FEB352D, -1, 2**32) % 2**32
    return x ^ x >> 16


def assert_independent(one, other):
    apart = ((one == other).double().mean() - 0.5) * 2 * math.sqrt(one.numel())
    assert abs(apart) < 5


def test_the_test_of_independence_finds_what_is_not():
    here = drawn(1)
    one_in_a_hundred = torch.rand(here.shape, generator=torch.Generator().manual_seed(0)) < 0.01
    with pytest.raises(AssertionError):
        assert_independent(here, torch.where(one_in_a_hundred, here, drawn(2)))


def rng_state(device):
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def test_seeds_follow_torchs_generator(device):
    torch.manual_seed(0)
    first = list(new_seeds(3, device))
    state = rng_state(device)
    new_seeds(3, device)  # draws nothing yet
    assert torch.equal(rng_state(device), state)
    torch.manual_seed(0)
    assert all(map(torch.equal, first, new_seeds(3, device)))
    assert len({int(seed) for seed in first}) == 3


# -- models ---------------------------------------------------------------------------------
@pytest.fixture
def same_draws(monkeypatch, device):
    """Stock PyTorch drops what the kernels drop in a batch [B, S]: same_draws(mask) before each
    forward, theirs or ours."""
    state = {}

    def start(mask):
        state["seeds"] = iter([seed.to(device) for seed in SEEDS])
        where = tokens(mask, device)
        state["rows"] = (where.flatten().cumsum(0) - 1).view(B, S).int()
        state["columns"] = (where.cumsum(1) - 1).int()

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        seed, rows, columns = next(state["seeds"]), state["rows"], state["columns"]
        if x.ndim == 3:  # [B, S, H]
            column = torch.arange(x.shape[2], dtype=torch.int32, device=x.device)
            keeps = kept(seed, rows[:, :, None], column, p)
        else:  # [B, heads, S, S]
            head = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[:, None]
            rows = rows[:, None] * x.shape[1] + head
            keeps = kept(seed, rows[..., None], columns[:, None, None], p)
        return torch.where(keeps, x / (1 - p), 0.0)

    monkeypatch.setattr(F, "dropout", dropout)
    for name in ("bert_fast.modeling", "bert_fast.attention_interface"):
        monkeypatch.setattr(sys.modules[name], "new_seeds", lambda count, device: state["seeds"])
    return start


def results(model, mask, device):
    """last_hidden_state at tokens, and by name the gradients of a function of it."""
    model.zero_grad()
    last = model(ids_of(device), attention_mask=mask).last_hidden_state[tokens(mask, device)]
    last.square().mean().backward()
    grads = {
        name.removeprefix("_orig_mod."): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"last_hidden_state": last.detach(), **grads}


def assert_close(one, other):
    assert len(other) > 20
    for name in other:
        torch.testing.assert_close(
            one[name], other[name], atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_results(ours, stock, mask, device, same_draws):
    found = []
    for model in (ours, stock):
        same_draws(mask)
        found.append(results(model, mask, device))
    assert found[0].keys() == found[1].keys()
    assert_close(*found)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_stock_with_the_same_draws(name, kind, device, same_draws):
    probabilities = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    if name.startswith("DistilBert"):
        probabilities = {"dropout": 0.2, "attention_dropout": 0.3}
    stock = stock_model(name, device, attn_implementation="eager", **probabilities).train()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    assert_same_results(fast, stock, masks(device)[kind], device, same_draws)
    assert_ran_fast(fast)


def test_attention_interface_trains_as_stock_with_the_same_draws(device, same_draws):
    stock = stock_model(device=device, attn_implementation="eager").train()
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation("bert_fast")
    assert_same_results(ours, stock, masks(device)["none"], device, same_draws)
    attention = bert_fast.report(ours).attention
    assert (attention.fast_calls, attention.stock_calls) == (2, {})


def test_cross_attention_trains_with_dropout(device, same_draws):
    stock = stock_model(
        device=device, attn_implementation="eager", is_decoder=True, add_cross_attention=True,
        num_hidden_layers=1,
    ).train()  # fmt: skip
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    states = torch.randn(B, S, 64, device=device)
    found = []
    for model in (fast, stock):
        same_draws(None)
        inputs = {"encoder_hidden_states": states, "use_cache": False}
        found.append(model(ids_of(device), **inputs).last_hidden_state)
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)
    assert_ran_fast(fast)


@pytest.mark.parametrize("part", ["embeddings", "encoder.layer.0.attention.self", "encoder"])
def test_each_module_drops_as_it_is_set(part, device, same_draws):
    """A part in eval() drops nothing, whatever the rest does."""
    stock = stock_model(device=device, attn_implementation="eager").train()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    for model in (fast, stock):
        model.get_submodule(part).eval()
    assert_same_results(fast, stock, masks(device)["right"], device, same_draws)


def test_evaluation_draws_nothing(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    state = rng_state(device)
    one, other = (fast(ids_of(device)).last_hidden_state for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(rng_state(device), state)


def test_each_call_draws_anew_and_the_generators_seed_repeats_it(device):
    fast = bert_fast.accelerate(stock_model(device=device)).train()
    torch.manual_seed(3)
    first, second = (fast(ids_of(device)).last_hidden_state for _ in range(2))
    torch.manual_seed(3)
    again = fast(ids_of(device)).last_hidden_state
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert_ran_fast(fast)


def test_dropouts_of_a_model_drop_other_places(device, monkeypatch):
    """Each takes a seed of its own."""
    taken = []

    def seeds(count, device):
        for seed in itertools.islice(new_seeds(count, device), count):
            taken.append(int(seed))
            yield seed

    monkeypatch.setattr(sys.modules["bert_fast.modeling"], "new_seeds", seeds)
    bert_fast.accelerate(stock_model(device=device)).train()(ids_of(device))
    assert len(taken) == len(set(taken)) == 1 + 2 * 3


@pytest.mark.skipif(INTERPRET, reason="dynamo cannot trace the interpreter's launches")
def test_torch_compile_gives_one_graph_with_equal_results(device):
    fast = bert_fast.accelerate(stock_model(device=device)).train()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    mask = masks(device)["right"]
    torch.manual_seed(4)
    expected = results(fast, mask, device)
    torch.manual_seed(4)
    assert_close(results(compiled, mask, device), expected)
    assert fast_calls(fast) == [(1, {})]
