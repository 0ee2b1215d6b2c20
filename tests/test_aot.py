"""The compile report: what ships keeps its budgets, and each budget can be broken."""

import itertools
import json
import re
import sys
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from models import stock_model

import bert_fast
from bert_fast import encoder
from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.launch import HAS_TRITON, INTERPRET

if not HAS_TRITON:
    pytest.skip("nothing to compile without triton", allow_module_level=True)
if INTERPRET:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

import aot
import forward
import roofline
import triton
import triton.language as tl
from aot import BULK, GATED, compile_all, kernels_without_spec, launch_row, report
from roofline import GPUS, TARGETS, Instruction, analyse, flow, predict, width


# -- what ships -----------------------------------------------------------------------------
def is_variant(row):
    """Of these nothing is predicted."""
    return row["case"].endswith((" PERSISTENT=1", " num_tokens=1"))


def is_of_triton_3_6(row):
    """What that makes of gradients with dropout, see docs/design.md, Launch configurations."""
    of_dropout = row["kernel"] == "_dq_kernel" and "dropout" in row["case"]
    return triton.__version__.startswith("3.6.") and of_dropout


def test_every_launch_keeps_its_budgets():
    rows = report(SPECS, GATED, ["bfloat16", "float32"], jobs=2)
    assert {row["op"] for row in rows} == {s.name for s in SPECS}
    over = [
        f"{r['op']} {r['case']} {r['dtype']} {r['arch']}: {o}"
        for r in rows
        for o in r["over"]
        if not (o.endswith("awaited alone") and is_of_triton_3_6(r))
    ]
    assert not over, "\n".join(over)
    for row in rows:
        assert row["registers"] > 0
        assert (row["bytes"] > 0) != is_variant(row)
        assert row["resident"] > 0
        for seconds in (p["seconds"] for p in row["predicted"].values()):
            assert 1e-6 < seconds < 1
    of_variants = {
        (row["kernel"], row["arch"], row["dtype"]) for row in rows if "PERSISTENT" in row["case"]
    }
    assert of_variants == {("_persistent_kernel", "sm_90", "bfloat16")}
    counted = {row["op"] for row in rows if "num_tokens=1" in row["case"]}
    takes = {s.name for s in SPECS if "num_tokens" in signature(s.fn).parameters}
    assert counted == takes - {"attention"}  # whose code is the same, as cu_seqlens says as much


@pytest.mark.parametrize("arch", [a for a in TARGETS if a not in GATED])
def test_every_kernel_compiles_elsewhere_and_fits_shared_memory(arch):
    for spec in SPECS:
        for launched in compile_all(spec, spec.bench[-1], torch.float16, [arch])[arch]:
            assert launched.kernel.metadata.shared <= TARGETS[arch].shared


def test_exact_products_in_fp32_keep_their_budgets(monkeypatch):
    """Where torch is told "ieee", they are taken on any GPU."""
    monkeypatch.setattr(launch, "fp32_precision", lambda: "ieee")
    specs = [s for s in SPECS if s.name in ("linear", "qkv", "gelu_gradient")]
    found = report(specs, ["sm_80", "sm_90"], ["float32"])
    assert all("bf16x6" not in row["dots"] for row in found)
    assert not [row["over"] for row in found if row["over"]]


@pytest.mark.parametrize("setting", ["none", "ieee"])
def test_products_in_fp32_add_up_sums_of_steps_not_one_chain_over_all_of_them(setting, monkeypatch):
    """A product that starts from the accumulator of another goes on with its chain. In fp32 that is
    one of the same step, of six that are of bf16 and stand for one unless torch says "ieee"."""
    monkeypatch.setattr(launch, "fp32_precision", lambda: setting)
    heads, product = {"lengths": (100,), "D": 16}, {"T": 600, "K": 256, "N": 48}
    cases = {"attention": heads, "attention_backward": heads, "linear": product, "qkv": product}
    cases["weight_gradient"] = product
    specs = [s for s in SPECS if s.name in cases]
    assert len(specs) == len(cases)
    for spec, dtype in itertools.product(specs, (torch.float32, torch.float16)):
        case = cases[spec.name]
        for launched in compile_all(spec, case, dtype, ["sm_90"])["sm_90"]:
            if launched.kernel.name == "_sum_kernel":
                continue
            ttgir = launched.kernel.asm["ttgir"]
            start = re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", ttgir)
            start += re.findall(r"warp_group_dot %\S+, %\S+, (%\w+)", ttgir)
            assert start
            if (dtype, setting) == (torch.float32, "none") and spec.name in ("linear", "qkv"):
                made_by = [re.search(rf"{name}(:\d+)? = (\S+)", ttgir)[2] for name in start]
                assert made_by[0] == "arith.constant"
                of_the_step = ("ttng.warp_group_dot", "tt.dot", "arith.select")  # NaN is taken out
                assert all(op.startswith(of_the_step) for op in made_by[1:]), made_by
                continue
            chains = any(not name.startswith("%cst") for name in start)
            assert chains == (dtype == torch.float16)


def test_in_fp32_the_maximum_is_taken_off_before_anything_is_rounded():
    """Else the probability of a query's only key would not be 1."""
    case = {"lengths": (100,), "heads": 1, "D": 16}
    for spec in SPECS[:2]:
        assert spec.name in ("attention", "attention_backward")
        for launched in compile_all(spec, case, torch.float32, ["sm_90"])["sm_90"]:
            ptx = launched.kernel.asm["ptx"]
            lines = re.findall(r"(\w+)(?:\.rn)?\.f32\s+(%r\d+), (.*);", ptx)
            made = {register: (op, sources) for op, register, sources in lines}
            exponents = re.findall(r"ex2\.approx\S*\s+%r\d+, (%r\d+);", ptx)
            assert exponents
            for op, sources in (made[register] for register in exponents):
                assert op in ("mul", "fma")  # in gradients less the logarithm of a sum
                assert "sub" in [made[s][0] for s in sources.split(", ")[:2] if s in made]


def test_products_and_their_sums_are_one_instruction_whatever_the_default(monkeypatch):
    """From Triton 3.10 on they are two unless asked for."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    (spec,) = (s for s in SPECS if s.name == "layer_norm")
    (launched,) = compile_all(spec, {"shape": (3, 72)}, torch.float32, ["sm_90"])["sm_90"]
    assert "fma.rn.f32" in launched.kernel.asm["ptx"] and launched.kernel.metadata.enable_fp_fusion


@pytest.mark.usefixtures("tf32")
def test_tf32_runs_on_tensor_cores_without_spills():
    for spec in (s for s in SPECS if s.name in ("attention", "linear", "weight_gradient")):
        for case, arch in itertools.product(spec.bench[:2], GATED):
            for launched in compile_all(spec, case, torch.float32, [arch])[arch]:
                if launched.kernel.name == "_sum_kernel":
                    continue
                resources = analyse(launched.kernel, TARGETS[arch])
                assert any("TF32" in op or "xf32" in op for op in resources.tensor), resources
                assert resources.spills["hot"] == 0, resources


def test_a_batch_of_another_shape_compiles_nothing():
    """Seconds of a user's time, for nothing that the code could gain by."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    sizes["max_position_embeddings"] = 512
    model = bert_fast.accelerate(stock_model(**sizes), cuda_graphs=False).half()

    target = TARGETS["sm_90"].triton

    def kernels_of(B, S):
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[0, S // 2 :] = False
        ids = torch.zeros(B, S, dtype=torch.int64)
        encode = partial(model, ids, mask)
        return {(k.kernel.name, k.kernel.hash) for k in aot._launches(encode, {}, target)}

    with patch.object(encoder, "_stays_on_device", lambda device: True):
        first = kernels_of(4, 16)
        for B, S in ((1, 1), (1, 17), (3, 31), (5, 16), (2, 1), (1, 300)):
            assert kernels_of(B, S) == first, (B, S)
    assert len(first) == 9  # pack has two, linear too: with a residual, and with GELU


@pytest.mark.parametrize(
    "op, cases",
    {
        "attention_backward": [{"lengths": lengths} for lengths in ((5,), (16, 16), (1, 0, 300))],
        "layer_norm_backward": [{"shape": (M, 64)} for M in (1, 16, 3000)],
        "weight_gradient": [{"T": T, "N": 64, "K": 64} for T in (65, 128, 3000)],
    }.items(),
)
def test_gradients_of_a_batch_of_another_shape_compile_nothing(op, cases):
    (spec,) = (s for s in SPECS if s.name == op)
    found = [
        [k.kernel.hash for k in compile_all(spec, case, torch.float16, ["sm_90"])["sm_90"]]
        for case in cases
    ]
    assert len(found[0]) == 2
    assert all(hashes == found[0] for hashes in found)


def test_every_op_with_a_kernel_has_a_spec():
    assert kernels_without_spec() == []
    assert kernels_without_spec([s for s in SPECS if s.name != "gelu"]) == ["gelu"]


# -- a forward ------------------------------------------------------------------------------
def test_the_layer_that_is_predicted_is_the_one_that_runs(monkeypatch):
    """The same ops in the same order, of the same sizes."""
    hidden, heads, B, S = 32, 2, 3, 5
    called = []

    def record(name, case_of):
        fn = getattr(encoder.ops, name)

        def call(*args, **kwargs):
            called.append((name, case_of(*args, **kwargs)))
            return fn(*args, **kwargs)

        monkeypatch.setattr(encoder.ops, name, call)

    def of_product(x, weight, bias, activation, residual, **_):
        case = {"T": len(x), "K": x.shape[1], "N": len(weight)}
        case |= {"gelu": True} if activation == "gelu" else {}
        return case | ({"residual": True} if residual is not None else {})

    def of_qkv(x, weight, *_, **__):
        return {"T": len(x), "K": x.shape[1], "N": len(weight)}

    def of_attention(q, k, v, cu_seqlens, *_, **__):
        return {"lengths": tuple(cu_seqlens.diff().tolist()), "heads": q.shape[1], "D": q.shape[2]}

    def of_layer_norm(x, weight, bias, residual, eps, **_):
        assert residual is None
        return {"shape": tuple(x.shape), "residual": False}

    record("linear", of_product)
    record("qkv", of_qkv)
    record("layer_norm", of_layer_norm)
    record("attention", of_attention)
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    model = bert_fast.accelerate(stock_model(**sizes))
    tokens = encoder.Tokens(None, B, S, torch.device("cpu"))
    x = torch.randn(B * S, hidden)
    layer = model.encoder.layer[0]
    encoder.layer_forward(model.architecture, layer, x, tokens, iter(()), causal=False)
    assert called == [(op, case) for _, op, case in forward.layer(hidden, heads, B, S)]


def test_a_forward_is_predicted_of_the_forms_that_the_report_predicts():
    """Not of the persistent one, which is the default where rows are many."""
    (spec,) = (s for s in SPECS if s.name == "linear")
    case = {"T": 16384, "K": 768, "N": 768, "residual": True}
    rows = aot.rows(replace(spec, bench=(case,)), ["sm_90"], ["bfloat16"])
    (of_report,) = (row["predicted"]["H200"]["seconds"] for row in rows if row["predicted"])
    assert forward.seconds("linear", case, "H200", "bfloat16", {}) == of_report


def test_a_forward_is_its_layers_and_what_comes_once(monkeypatch):
    asked = []
    monkeypatch.setattr(forward, "seconds", lambda *args: asked.append(args[:2]) or 1e-5)
    base = next(w for w in forward.WORKLOADS if (w.model, w.S) == ("base", 128))
    found = forward.predict(base)
    assert found["forward"] == pytest.approx((12 * 7 + 3) * 1e-5)
    flops = base.B * 128 * (169.9e6 + 0.0369e6 * 128)  # of a token, as published
    ceiling = GPUS["H200"].tensor * roofline.PRODUCT
    assert found["share"] == pytest.approx(flops / 87e-5 / ceiling, rel=1e-3)
    known = {spec.name: spec for spec in SPECS}
    for op, case in asked:
        if op != "attention":  # its inputs are large
            small = {"T": 2, "B": 2, "K": 2, "N": 2, "shape": (2, 2)}
            case = {k: small.get(k, v) for k, v in case.items()}
            known[op].inputs(torch.float16, "cpu", **case)


# -- kernels that break a budget ------------------------------------------------------------
@triton.jit
def _product(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    """c = a b of one tile."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, 16):
        offs_k = start + tl.arange(0, 16)
        a = tl.load(a_ptr + offs[:, None] * K + offs_k[None, :])
        b = tl.load(b_ptr + offs_k[:, None] * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _copy(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """Elements `stride` apart: one access for each."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * stride, tl.load(x_ptr + offs * stride))


def row_of(kernel, args, arch, programs=1, moved=BULK, **options):
    """The report's row of one launch, compiled as the report compiles."""
    (launched,) = aot._launches(
        lambda: kernel[(programs,)](*args, **options), {}, TARGETS[arch].triton
    )
    resources = analyse(launched.kernel, TARGETS[arch])
    labels = {"op": "planted", "case": "", "dtype": "bfloat16"}
    return launch_row(labels, arch, resources, launched.programs, 10**9, moved)


def tiles(block, K=64, dtype=torch.bfloat16):
    shapes = (block, K), (K, block)
    return *(torch.zeros(s, dtype=dtype) for s in shapes), torch.zeros(block, block), K


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_spill_in_the_loop_is_over_budget(arch):
    """256 x 256 sums in fp32 are 512 a thread of 4 warps, and 255 registers there are."""
    row = row_of(_product, tiles(256), arch, BLOCK=256, num_warps=4)
    assert row["spills"]["hot"] > 0
    assert any(o.startswith("spills: ") for o in row["over"])
    row = row_of(_product, tiles(64), arch, BLOCK=64, num_warps=4)
    assert row["spills"] == {"hot": 0, "cold": 0}
    assert not any(o.startswith("spills: ") for o in row["over"])


@pytest.mark.parametrize("arch", GATED)
def test_a_product_on_the_tensor_cores_shows(arch):
    row = row_of(_product, tiles(64), arch, BLOCK=64, num_warps=4)
    assert row["tensor"]
    assert row["dots"] == ("bf16",)
    assert not any("tensor cores" in o for o in row["over"])
    without = {**row, "tensor": {}}  # a tl.dot that the compiler expanded
    assert "tensor cores: none for products of bf16" in aot.budget(without)
    exact = row_of(_product, tiles(64, dtype=torch.float32), arch, BLOCK=64, num_warps=4)
    assert exact["dots"] == ("f32",)
    assert bool(exact["tensor"]) != TARGETS[arch].nvidia  # which has none for that
    assert not any("tensor cores" in o for o in exact["over"])


@pytest.mark.parametrize("arch", GATED)
def test_narrow_accesses_are_over_budget_where_they_cost_time(arch):
    x, y = torch.zeros(2, 4096, dtype=torch.bfloat16).unbind()
    narrow = row_of(_copy, (x, y, 3), arch, BLOCK=1024, num_warps=4)
    assert any(o.startswith("accesses: 0% ") for o in narrow["over"])
    small = row_of(_copy, (x, y, 3), arch, moved=BULK - 1, BLOCK=1024, num_warps=4)
    assert small["over"] == []
    whole = row_of(_copy, (x, y, 1), arch, BLOCK=1024, num_warps=2 if arch == "gfx942" else 4)
    assert whole["wide"] == 1
    assert whole["over"] == []


def test_products_that_wait_for_each_other_are_over_budget():
    """As ptxas 12.8 compiles _dq_kernel with dropout, of Triton 3.6's code."""

    def loop(waits):
        opcodes = ["HGMMA.64x64x16.F32.BF16"] * 12 + ["WARPGROUP.DEPBAR.LE"] * waits
        return [SimpleNamespace(opcode=opcode) for opcode in opcodes]

    assert roofline._serial(loop(3)) == 0
    assert roofline._serial(loop(12)) == 12
    row = row_of(_product, tiles(64), "sm_90", BLOCK=64, num_warps=4)
    assert row["serial"] == 0
    assert "tensor cores: 12 products in a hot loop, each awaited alone" in aot.budget(
        {**row, "serial": 12}
    )


def test_too_much_shared_memory_is_over_budget():
    row = row_of(_product, tiles(64), "sm_80", BLOCK=64, num_warps=4)
    more = {**row, "shared": row["shared_limit"] + 1}
    assert aot.budget(more) == ["shared memory: 166913 bytes, 166912 there are"]


# -- reading machine code -------------------------------------------------------------------
def test_the_innermost_loop_is_hot_and_a_poll_is_none():
    """0, an outer loop of 1 to 5 with an inner of 2 and 3, a poll at 4, the end at 6, a trap."""
    code = [
        Instruction("S2R"),
        Instruction("IADD"),
        Instruction("FFMA"),
        Instruction("BRA", to="inner"),
        Instruction("SYNCS.PHASECHK", to="poll"),
        Instruction("BRA", to="outer"),
        Instruction("EXIT", falls=False, exits=True),
        Instruction("BPT.TRAP", falls=False),
    ]
    hot, others = flow(code, {"inner": 2, "poll": 4, "outer": 1})
    assert [[i.opcode for i in loop] for loop in hot] == [["FFMA", "BRA"]]
    assert [i.opcode for i in others] == ["S2R", "IADD", "SYNCS.PHASECHK", "BRA", "EXIT"]


@pytest.mark.parametrize(
    "opcode, kind, bits",
    [
        ("LDG.E.128", "load", 128), ("LDG.E.64.CONSTANT", "load", 64), ("LDG.E.U16", "load", 16),
        ("LDG.E", "load", 32), ("STG.E.128", "store", 128), ("STG.E.128", "load", 0),
        ("LDGSTS.E.BYPASS.128", "load", 128), ("global_load_dwordx4", "load", 128),
        ("buffer_store_dwordx2", "store", 64), ("global_load_ushort", "load", 16),
        ("LDS.128", "load", 0),
    ],
)  # fmt: skip
def test_widths_of_accesses(opcode, kind, bits):
    assert width(opcode, kind) == bits


# -- time -----------------------------------------------------------------------------------
def test_a_large_copy_is_predicted_at_the_bandwidth_and_a_small_one_at_the_launch():
    x, y = torch.zeros(2, 4096, dtype=torch.bfloat16).unbind()
    (launched,) = aot._launches(
        lambda: _copy[(4,)](x, y, 1, BLOCK=1024, num_warps=4), {}, TARGETS["sm_90"].triton
    )
    resources, gpu = analyse(launched.kernel, TARGETS["sm_90"]), GPUS["H200"]
    gibibyte = predict(resources, gpu, 2**18, 0, 2**30)
    assert gibibyte["bound"] == "memory"
    least = 2**30 / (gpu.bandwidth * roofline.COPY)
    assert least < gibibyte["seconds"] < 1.2 * least
    assert predict(resources, gpu, 1, 0, 4096)["bound"] == "launch"


def test_products_are_predicted_at_the_tensor_cores_and_ragged_waves_cost():
    row = row_of(_product, tiles(64, K=4096), "sm_90", BLOCK=64, num_warps=4)
    resources = roofline.Resources(**{f: row[f] for f in roofline.Resources.__dataclass_fields__})
    gpu = GPUS["H100"]
    flops = 2 * 64 * 64 * 4096
    whole = predict(resources, gpu, 132, 132 * flops, 1000)
    more = predict(resources, gpu, 133, 133 * flops, 1000)
    assert whole["tensor"] == pytest.approx(132 * flops / (gpu.tensor * roofline.PRODUCT))
    assert more["tensor"] == pytest.approx(2 * whole["tensor"])


@pytest.mark.parametrize("stages", [3, 6])
def test_tiles_come_from_l2_each_once_however_far_ahead_they_are_loaded(stages):
    K = 160
    row = row_of(_product, tiles(64, K=K), "sm_90", BLOCK=64, num_warps=4, num_stages=stages)
    resources = roofline.Resources(**{f: row[f] for f in roofline.Resources.__dataclass_fields__})
    gpu = GPUS["H100"]
    predicted = predict(resources, gpu, 1320, 1320 * 2 * 64 * 64 * K, 1000)
    moved = 1320 * (2 * 64 * K * 2 + 64 * 64 * 4)  # two operands in 16 bits, a result in 32
    rate = gpu.l2 * gpu.clock * roofline.COPY
    assert predicted["L2"] == pytest.approx(moved / rate, rel=0.05)
    slow = predict(resources, replace(gpu, l2=64), 1320, 1320 * 2 * 64 * 64 * K, 1000)
    assert slow["bound"] == "L2"
    assert slow["seconds"] == pytest.approx(roofline.LAUNCH + predicted["L2"] * gpu.l2 / 64)


# -- what was measured ----------------------------------------------------------------------
def test_predictions_stand_beside_what_a_result_file_measured(tmp_path):
    case = "gelu(shape=(16384, 3072))"
    content = {
        "device": {"name": "NVIDIA H200", "multiprocessors": 132},
        "rows": [
            {"workload": case, "dtype": "bfloat16", "contender": who, "status": status,
             "median_s": 9e-5}
            for who, status in (("ours", "ok"), ("F.gelu", "ok"), ("ours", "FAILED"))
        ],
    }  # fmt: skip
    (tmp_path / "h200.json").write_text(json.dumps(content))
    for name, count in (("a CPU", None), ("NVIDIA GH200 480GB", 132), ("NVIDIA H100 PCIe", 114)):
        other = {**content, "device": {"name": name, "multiprocessors": count}}
        (tmp_path / f"{name}.json").write_text(json.dumps(other))
    (gelu,) = (s for s in SPECS if s.name == "gelu")
    rows = report([gelu], ["sm_90"], ["bfloat16"])
    ((file, gpu, at, dtype, ours, theirs),) = aot.measured(rows, tmp_path)
    assert (file, gpu, at, dtype, theirs) == ("h200.json", "H200", case, "bfloat16", 9e-5)
    expected = [r["predicted"]["H200"]["seconds"] for r in rows if r["case"] == case]
    assert [ours] == expected


# -- what is missing ------------------------------------------------------------------------
def test_a_missing_tool_names_the_package_that_brings_it(monkeypatch):
    class Nothing:
        @property
        def ptxas(self):
            raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(roofline.triton.knobs, "nvidia", Nothing())
    with pytest.raises(FileNotFoundError) as caught:
        roofline.tool("ptxas")
    said = str(caught.value)
    assert said.startswith("ptxas is missing. The triton wheel brings it: pip install")
    assert "pip install nvidia-cuda-nvcc" in said
    assert "TRITON_PTXAS_PATH" in said


def test_an_op_without_a_spec_is_named(monkeypatch, capsys):
    monkeypatch.setitem(launch.KERNELS, "orphan", None)
    monkeypatch.setattr(aot, "report", lambda *args: [])
    options = type("Options", (), {"arch": ["sm_90"], "dtype": None, "jobs": 1, "json": None})
    assert aot.main(options, SPECS) == 1
    assert "the op orphan has kernels and no Spec among SPECS" in capsys.readouterr().out
