"""The ops: each case of each Spec against the definition and what torch itself offers."""

from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from workloads import Contender, Problem, Workload

from bert_fast.kernels import SPECS


def ops(dtype, device, quick):
    """A workload for each bench case of each op; the first case alone if quick."""
    return [
        Workload(
            name=spec.label(case),
            dtype=dtype,
            contenders=(DEFINITION, *PEERS.get(spec.name, ()), OURS),
            baseline=(DEFINITION, *PEERS.get(spec.name, ()))[-1].name,
            prepare=partial(_op_problem, spec, case, dtype, device),
        )
        for spec in SPECS
        for case in spec.bench[: 1 if quick else None]
    ]


def _op_problem(spec, case, dtype, device):
    torch.manual_seed(0)
    flops, moved = spec.cost(8, **case)
    small = flops <= 2e10 and moved <= 2**29  # of fp64, a few seconds and 2 GB with temporaries
    timed = spec.inputs(dtype, device, **case)
    checked = timed if small else spec.inputs(dtype, device, **spec.cases[0])
    truth = _tensors(spec.ref(**{
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in checked.items()
    }))  # fmt: skip
    peak = max((t.abs().max().item() for t in truth if t.is_floating_point()), default=0.0)
    flops, moved = spec.cost(dtype.itemsize, **case)
    return Problem(
        subject=spec,
        timed=timed,
        checked=checked,
        checked_on=spec.label(case if small else spec.cases[0]),
        truth=truth,
        gate=partial(_op_gate, ulp=torch.finfo(dtype).eps * peak),
        work={"C": flops, "B": moved},
    )


def _tensors(result, inputs=None):
    return list(result) if isinstance(result, tuple) else [result]


def _op_gate(error, baseline, ulp):
    """The tests' allowance, in short: an ulp of the largest result and four baseline errors."""
    limit = ulp + 4 * baseline["max"]
    if not error["max"] <= limit:
        return f"error {error['max']:.2g}, at most {limit:.2g} is allowed"
    return None


DEFINITION = Contender(
    "definition",
    lambda problem: lambda inputs: partial(problem.subject.ref, **inputs),
    _tensors,
    gated=False,  # in fp16 and bf16 it rounds at every step
)
OURS = Contender(
    "ours",
    lambda problem: lambda inputs: partial(problem.subject.fn, **inputs),
    _tensors,
)


def _padded_sdpa(q, k, v, cu_seqlens, max_seqlen, causal, scale):
    lengths = cu_seqlens.diff()
    q, k, v = (
        pad_sequence(t.split(lengths.tolist()), batch_first=True).transpose(1, 2) for t in (q, k, v)
    )
    valid = torch.arange(max_seqlen, device=q.device) < lengths[:, None]  # [B, S]
    # Padding is at the end, where a causal query sees none of it.
    mask = None if causal or valid.all() else valid[:, None, None]
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def _unpadded(o, cu_seqlens, max_seqlen, **_):
    valid = torch.arange(max_seqlen, device=o.device) < cu_seqlens.diff()[:, None]
    return [o.transpose(1, 2)[valid]]


def _padded_embedding(
    input_ids, word, position, token_type, weight, bias, token_type_ids, position_ids, **_
):
    def run():
        h = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
        h = h + F.embedding(position_ids, position)
        return F.layer_norm(h, weight.shape, weight, bias, 1e-12)

    return run


def _taken(y, row_index, **_):
    y = y.flatten(0, 1)
    return [y if row_index is None else y[row_index]]


def _nonzero(attention_mask):
    def run():
        row_index = attention_mask.flatten().nonzero().flatten()
        packed_row = torch.full_like(attention_mask, -1)
        packed_row.view(-1)[row_index] = torch.arange(len(row_index), device=row_index.device)
        cu_seqlens = F.pad(attention_mask.sum(1).cumsum(0), (1, 0))
        return row_index, packed_row, cu_seqlens

    return run


def _filled(result, attention_mask):
    row_index, packed_row, cu_seqlens = result
    return [F.pad(row_index, (0, attention_mask.numel() - len(row_index))), packed_row, cu_seqlens]


def _indexed(x, packed_row):
    row_index = (packed_row >= 0).flatten().nonzero().flatten()

    def run():
        out = x.new_zeros(packed_row.numel(), x.shape[1])
        out[row_index] = x
        return out.view(*packed_row.shape, -1)

    return run


def _peer(name, bind, collect=lambda result, **_: [result]):
    return Contender(
        name,
        lambda problem: lambda inputs: bind(**inputs),
        lambda result, inputs: collect(result, **inputs),
    )


PEERS = {  # what one would write with torch alone, the last of an op being its baseline
    "attention": (_peer("padded sdpa", _padded_sdpa, _unpadded),),
    "layer_norm": (
        _peer(
            "F.layer_norm",
            lambda x, weight, bias, residual, eps: lambda: F.layer_norm(
                x + residual, weight.shape, weight, bias, eps
            ),
        ),
    ),
    "gelu": (_peer("F.gelu", lambda x, bias: lambda: F.gelu(x + bias)),),
    "embedding": (_peer("padded F.embedding", _padded_embedding, _taken),),
    "pack": (_peer("nonzero", _nonzero, _filled),),
    "unpack": (_peer("index_put", _indexed),),
}
