"""What test_ops.py cannot say for every op: attention's bits whatever the batch."""

import re

import pytest
import torch

from bert_fast.kernels import attention, attention_backward, launch
from bert_fast.kernels.attention import _config, cu_seqlens_of
from bert_fast.kernels.attention_backward import _configs
from bert_fast.kernels.launch import DTYPES, INTERPRET

GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = (1, 20, 64, 65, 128, 130)


def attend(sequences, causal, max_seqlen, further=0):
    """The results of q, k, v [L, heads, D] of each sequence, packed in this order."""
    lengths = [len(q) for q, _, _ in sequences]
    packed = [torch.cat(t) for t in zip(*sequences)]
    num_tokens = None
    if further:
        packed = [torch.cat((t, t.new_full((further, *t.shape[1:]), torch.nan))) for t in packed]
        num_tokens = torch.tensor([sum(lengths)], device=DEVICE)
    cu_seqlens = cu_seqlens_of(lengths, DEVICE)
    o = attention(*packed, cu_seqlens, max_seqlen, causal=causal, num_tokens=num_tokens)
    return o[: sum(lengths)].split(lengths)


@pytest.mark.skipif(GPU or INTERPRET, reason="only the CPU's form knows the lengths")
def test_lengths_past_the_rows_are_refused():
    q = torch.randn(12, 2, 16)
    with pytest.raises(ValueError, match="cu_seqlens must end at 10 rows or before, got 12"):
        attention(q[:10], q[:10], q[:10], cu_seqlens_of([5, 7], "cpu"), 7)
    with pytest.raises(ValueError, match="cu_seqlens_k must end at 10 rows or before, got 12"):
        attention(
            q, q[:10], q[:10], cu_seqlens_of([12], "cpu"), 12,
            cu_seqlens_k=cu_seqlens_of([12], "cpu"), max_seqlen_k=12,
        )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 1e-60, -1e-60])
def test_a_scale_that_fp32_has_as_zero_is_zero(scale):
    """-inf * 0 would be NaN where a key is masked."""
    q, k, v = (torch.randn(n, 2, 16, device=DEVICE) for n in (5, 33, 33))
    lengths = cu_seqlens_of([5], DEVICE), 5
    of_keys = {"cu_seqlens_k": cu_seqlens_of([33], DEVICE), "max_seqlen_k": 33, "scale": scale}
    o = attention(q, k, v, *lengths, **of_keys)
    torch.testing.assert_close(o, v.mean(0).expand_as(q), atol=1e-6, rtol=1e-5)
    grads = attention_backward(q, q, k, v, *lengths, **of_keys)
    torch.testing.assert_close(grads.dv, q.sum(0).expand_as(v) / 33, atol=1e-6, rtol=1e-5)
    assert not grads.dq.any() and not grads.dk.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # fp16 ends at 65,504
def test_of_huge_scores_the_largest_has_all(dtype):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(n, 2, 16, device=DEVICE).to(dtype) for n in (5, 40, 40, 5))
    lengths = cu_seqlens_of([5], DEVICE), 5
    options = {"cu_seqlens_k": cu_seqlens_of([40], DEVICE), "max_seqlen_k": 40, "scale": 1e9}
    largest = torch.einsum("qhd,khd->qhk", q.double(), k.double()).argmax(-1)
    heads = torch.arange(2, device=DEVICE)
    o = attention(q, k, v, *lengths, **options)
    assert torch.equal(o, v[largest, heads])
    grads = attention_backward(do, q, k, v, *lengths, **options)
    assert not grads.dq.any() and not grads.dk.any()
    expected = torch.zeros_like(v).double()
    expected.index_put_((largest, heads), do.double(), accumulate=True)
    torch.testing.assert_close(grads.dv, expected.to(dtype))


@pytest.mark.skipif(not (GPU or INTERPRET), reason="torch's own attention chooses by shape")
@pytest.mark.usefixtures("sums_without_place")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [32, 64])
@torch.no_grad()
def test_a_sequence_has_the_same_bits_in_any_batch(D, causal, dtype):
    """Alone, among others in any order, under any bound on the lengths, before further rows."""
    torch.manual_seed(0)
    sequences = [
        tuple(torch.randn(L, 2, D, device=DEVICE).to(dtype) for _ in range(3)) for L in LENGTHS
    ]
    alone = [attend([s], causal, len(s[0]))[0] for s in sequences]
    batches = ((range(6), 130, 0), (range(5, -1, -1), 512, 0), (range(6), 200, 9))
    for order, bound, further in batches:
        ours = attend([sequences[i] for i in order], causal, bound, further)
        for i, o in zip(order, ours, strict=True):
            assert torch.equal(o, alone[i]), LENGTHS[i]


@pytest.mark.skipif(not (GPU or INTERPRET), reason="torch's own products choose by shape")
@pytest.mark.usefixtures("sums_without_place")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_gradients_of_a_sequence_have_the_same_bits_in_any_batch(causal, dtype):
    torch.manual_seed(0)
    sequences = [
        [torch.randn(L, 2, 32, device=DEVICE).to(dtype) for _ in range(4)] for L in LENGTHS
    ]

    def gradients(of, max_seqlen):
        """Of each sequence: dq, dk, dv one after the other."""
        lengths = [len(sequences[i][0]) for i in of]
        packed = [torch.cat(t) for t in zip(*(sequences[i] for i in of))]
        cu_seqlens = cu_seqlens_of(lengths, DEVICE)
        found = attention_backward(*packed, cu_seqlens, max_seqlen, causal=causal)
        return list(zip(*(t.split(lengths) for t in found)))

    alone = [gradients([i], L)[0] for i, L in enumerate(LENGTHS)]
    for order, bound in ((range(6), 130), (range(5, -1, -1), 512)):
        for i, ours in zip(order, gradients(order, bound), strict=True):
            for name, a, b in zip(("dq", "dk", "dv"), ours, alone[i], strict=True):
                assert torch.equal(a, b), (name, LENGTHS[i])


@pytest.mark.skipif(GPU or INTERPRET, reason="to look at them a GPU would be waited for")
@pytest.mark.parametrize("wrong", [[2, 5, 8], [0, 5, 3], [0, -1, 8]])
def test_sequences_that_do_not_ascend_from_0_are_an_error(wrong):
    q, k, v = torch.randn(3, 8, 2, 16).requires_grad_().unbind()
    right = torch.tensor([0, 5, 8], dtype=torch.int32)
    cu_seqlens = torch.tensor(wrong, dtype=torch.int32)
    message = re.escape(f"must not decrease, and start at 0, got {wrong}")
    with pytest.raises(ValueError, match=f"cu_seqlens {message}"):
        attention(q, k, v, cu_seqlens, 8)
    with pytest.raises(ValueError, match=f"cu_seqlens_k {message}"):
        attention(q, k, v, right, 8, cu_seqlens_k=cu_seqlens, max_seqlen_k=8)


def test_a_tuned_tile_of_queries_stays_within_the_rows_that_a_sequence_has(monkeypatch):
    """In lse and delta; and that of _dkdv_kernel within what _dq_kernel has written."""
    tuned = {"BLOCK_D": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    for of_q, of_k, expected in ((256, 64, (128, 64)), (32, 128, (32, 32)), (256, 256, (128, 128))):
        tiles = {"attention_dq": of_q, "attention_dkdv": of_k}

        def configuration(op, *_, tiles=tiles, **__):
            return {**tuned, "BLOCK_M": tiles[op]}

        monkeypatch.setattr(launch, "configuration", configuration)
        found = _configs(64, 2, False, 90)
        assert tuple(config["BLOCK_M"] for config in found) == expected


def test_with_dropout_a_table_has_entries_of_its_own(monkeypatch):
    asked = []

    def configuration(op, default, fixed=(), rows=None, **key):
        asked.append((op, launch.written(key)))
        return default

    monkeypatch.setattr(launch, "configuration", configuration)
    _configs(64, 2, True, 90), _config(64, 2, True, 90), _config(64, 2, False, 90)
    assert asked == [
        ("attention_dq", "D=64 dropout=1 itemsize=2"),
        ("attention_dkdv", "D=64 dropout=1 itemsize=2"),
        ("attention", "D=64 dropout=1 itemsize=2"),
        ("attention", "D=64 itemsize=2"),
    ]
