"""Kernels as Triton compiles them give what their definitions give, in an emulator: no GPU needed.

check/compiled.py does this for every case of every op; here it is the first of each, a whole model,
and bugs that the emulator must find.
"""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")  # macOS, Windows

from models import assert_errs_no_more_than_stock, assert_same_training

from bert_fast import encoder
from bert_fast.kernels import SPECS, attention, layer_norm, layer_norm_backward, linear, qkv
from bert_fast.kernels.attention import cu_seqlens_of
from bert_fast.kernels.launch import DTYPES, INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

import compiled
from compiled import ARCHS, call_on, emulated
from emulator import execute
from examine import of_case, of_rows_past_num_tokens, of_tf32
from gpu_memory import Fault, Memory
from judge import varied

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
LINEAR, PACK = (next(s for s in SPECS if s.name == name) for name in ("linear", "pack"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_op(spec, arch):
    call, case = call_on(arch), spec.cases[0]
    for dtype in DTYPES:
        assert not list(of_case(spec, case, dtype, "contiguous", call))
    if spec.packed:
        assert not list(of_rows_past_num_tokens(spec, case, call))


def test_tensor_maps_and_tf32():
    with varied({"PERSISTENT": 1}):  # as below, where its mbarriers are removed
        assert not faults_of_linear("sm_90")
    assert not list(of_tf32(LINEAR, LINEAR.cases[0], call_on("sm_90")))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_and_its_training(arch, monkeypatch):
    """As on a GPU, where the number of tokens is not read on the host."""
    monkeypatch.setattr(encoder, "_stays_on_device", lambda device: True)
    with emulated(arch):
        assert_errs_no_more_than_stock("BertModel", torch.bfloat16, "cpu")
        assert_same_training("BertForSequenceClassification", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    """Whichever tile serves the batch, in either form."""
    torch.manual_seed(0)
    x, residual = torch.randn(1100, 128).to(dtype), torch.randn(1100, 768).to(dtype)
    weight, bias = torch.randn(768, 128).to(dtype), torch.randn(768).to(dtype)
    found = []
    for T, persistent in ((1, 0), (65, 0), (300, 0), (1100, 0), (300, 1)):
        with emulated("sm_90"), varied({"PERSISTENT": persistent}):
            y = linear(x[:T], weight, bias, activation="gelu", residual=residual[:T])
        found.append(y[0])
    assert all(torch.equal(row, found[0]) for row in found)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_fp32_by_products_of_bf16(arch, monkeypatch):
    """It errs like exact products, less than torch's, and has the same bits in every tile."""
    torch.manual_seed(0)
    x, weight = torch.randn(130, 768), torch.randn(140, 768)
    truth = x.double() @ weight.double().mT
    found, file = [], importlib.import_module("bert_fast.kernels.linear")
    for form in file._forms(int(arch[3:]), 4, "bf16x6"):
        monkeypatch.setattr(file, "_tile", lambda *_, form=form: form)
        with emulated(arch):
            found.append(linear(x, weight))
    assert all(torch.equal(y, found[0]) for y in found)
    monkeypatch.undo()
    monkeypatch.setattr(file.launch, "fp32_precision", lambda: "ieee")
    with emulated(arch):
        exact = linear(x, weight)
    assert not torch.equal(exact, found[0])
    error, of_exact, of_torch = (
        (y - truth).square().mean().sqrt() for y in (found[0], exact, x @ weight.mT)
    )
    assert error < 1.1 * of_exact and error < of_torch / 2


@pytest.mark.parametrize("arch", ARCHS)
def test_exact_products_in_fp32(arch, monkeypatch):
    """Of those that are six of bf16 otherwise; with enough rows for a weight by columns too."""
    monkeypatch.setattr("bert_fast.kernels.launch.fp32_precision", lambda: "ieee")
    columns = next(case for case in LINEAR.cases if case["T"] > 512)
    for case in (LINEAR.cases[0], columns):
        assert not list(of_case(LINEAR, case, torch.float32, "contiguous", call_on(arch)))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_fp32_by_products_of_bf16_leaves_infinity_and_nan_what_they_are(arch):
    """No number becomes NaN though the rest of what is infinite is not a number."""
    x, inf, nan = torch.randn(4, 16), torch.inf, torch.nan
    x[0, 3], x[1, 4], x[2, 5:7] = inf, nan, torch.tensor([inf, -inf])
    weight = torch.tensor([[1.0], [-0.5]]).expand(2, 16).contiguous()
    with emulated(arch):
        y = linear(x, weight)
        near = linear(torch.tensor([[3.38e38], [-1e38], [1e-33], [0.0]]), torch.ones(1, 1))
    torch.testing.assert_close(y, x @ weight.mT, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert near[:, 0].tolist() == pytest.approx([3.38e38, -1e38, 1e-33, 0.0], rel=1e-6, abs=0)


@torch.no_grad()
def test_query_key_and_value_have_the_bits_of_a_product_each():
    """In the persistent form each has a tensor map, which its programs select."""
    torch.manual_seed(0)
    x = torch.randn(300, 128).bfloat16()
    parts = [torch.randn(*shape).bfloat16() for shape in 3 * ((136, 128), (136,))]
    with emulated("sm_90"), varied({"PERSISTENT": 1}):
        y = qkv(x, *parts)
    with emulated("sm_90"), varied({"PERSISTENT": 0}):
        assert torch.equal(y, qkv(x, *parts))
        for i in range(3):
            assert torch.equal(y[:, i], linear(x, *parts[2 * i : 2 * i + 2]))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_rows_of_equal_numbers(arch):
    """Of their variance and its mean nothing is left where the divisions round correctly."""
    x, weight, bias = torch.full((2, 768), 100.3), torch.ones(768), torch.randn(768)
    dy = torch.randn(2, 768)
    with emulated(arch):
        y, gradients = layer_norm(x, weight, bias), layer_norm_backward(dy, x, weight)
    assert torch.equal(y, bias.expand(2, 768))
    g = dy.double()
    dx = (g - g.mean(-1, keepdim=True)) * 1e6  # 1 / sqrt(eps)
    torch.testing.assert_close(gradients.dx.double(), dx, rtol=1e-6, atol=1.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_to_the_largest_of_huge_scores(arch):
    """With s * scale - m * scale as one fma, the largest would not be 0, but anything."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 16).bfloat16() for n in (5, 40, 40))
    lengths = {"cu_seqlens_k": cu_seqlens_of([40], "cpu"), "max_seqlen_k": 40}
    with torch.no_grad(), emulated(arch):
        o = attention(q, k, v, cu_seqlens_of([5], "cpu"), 5, scale=1e9, **lengths)
    largest = torch.einsum("qhd,khd->qhk", q.double(), k.double()).argmax(-1)
    assert torch.equal(o, v[largest, torch.arange(2)])


# -- bugs that it must find -----------------------------------------------------------------
def broken(monkeypatch, pattern, replacement):
    """Kernels are executed after this change of their PTX."""

    def execute_broken(text, *args):
        changed, count = re.subn(pattern, replacement, text)
        assert count
        execute(changed, *args)

    monkeypatch.setattr(compiled, "execute", execute_broken)


def faults_of_linear(arch):
    """In words, of a case with several steps along K, whose rows can be copied asynchronously."""
    case = {"T": 37, "K": 512, "N": 136}
    return list(of_case(LINEAR, case, torch.bfloat16, "contiguous", call_on(arch)))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_copy_that_is_not_waited_for(arch, monkeypatch):
    broken(monkeypatch, r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 99")
    assert faults_of_linear(arch)


def test_a_tensor_map_whose_bytes_are_not_announced(monkeypatch):
    broken(monkeypatch, r"@%p\d+ mbarrier\.arrive[^;]*;", "")
    with varied({"PERSISTENT": 1}), pytest.raises(Fault, match=r"for ever, mbarrier\.try_wait"):
        faults_of_linear("sm_90")


def test_an_access_that_does_not_wait_for_the_launch_before(monkeypatch):
    broken(monkeypatch, r"griddepcontrol\.wait", "fence.sc.cta")
    with pytest.raises(Fault, match="does not wait for the launch before"):
        faults_of_linear("sm_90")


def test_matrices_in_another_order(monkeypatch):
    broken(monkeypatch, r"(ldmatrix[^{]*)\{(%r\d+), (%r\d+),", r"\1{\3, \2,")
    assert faults_of_linear("sm_80")


# -- instructions ---------------------------------------------------------------------------
HEAD = """
.version 8.0
.target sm_{arch}
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [kernel_param_0]; ld.param.b64 %rd1, [kernel_param_1];
    mov.u32 %r99, %tid.x; setp.eq.u32 %p0, %r99, 0;
    mad.wide.u32 %rd0, %r99, 16, %rd0; mad.wide.u32 %rd1, %r99, 4, %rd1;
"""
LOAD = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0];"
STORE = "st.global.b32 [%rd1], %r0; ret; }"


def run(body, given=None, threads=32, arch=80):
    """The uint32 that each thread leaves in %r0, given four in %r1 to %r4."""
    found = torch.zeros(threads, dtype=torch.int32)
    given = torch.zeros(threads, 4, dtype=torch.int32) if given is None else given
    memory = Memory([("given", given), ("found", found)])
    text = HEAD.format(arch=arch, threads=threads) + LOAD + body + STORE
    execute(text, 1024, 1, memory, [given.data_ptr(), found.data_ptr()])
    return found.numpy().view(np.uint32)


def one(body, *numbers, dtype=np.int32):
    """The number that body makes of up to four, as dtype."""
    bits = np.zeros((32, 4), np.uint32)
    bits[:, : len(numbers)] = np.array(numbers, dtype).view(np.uint32)
    return run(body, torch.from_numpy(bits.view(np.int32)))[:1].view(dtype)[0]


@pytest.mark.parametrize(
    ("body", "numbers", "expected"),
    [
        ("shl.b32 %r0, %r1, 40;", (1,), 0),
        ("shr.s32 %r0, %r1, 40;", (-8,), -1),
        ("shr.u32 %r0, %r1, 28;", (-1,), 15),
        ("bfe.s32 %r0, %r1, 4, 4;", (0x80,), -8),
        ("bfe.u32 %r0, %r1, 4, 4;", (0x80,), 8),
        ("div.s32 %r0, %r1, %r2;", (-7, 2), -3),
        ("rem.s32 %r0, %r1, %r2;", (-7, 2), -1),
        ("div.u32 %r0, %r1, %r2;", (-2, 2), 2**31 - 1),
        ("mul.hi.s32 %r0, %r1, %r2;", (-1, 2), -1),
        ("mad.lo.s32 %r0, %r1, %r2, %r3;", (3, 4, 5), 17),
        ("min.s32 %r0, %r1, %r2;", (-1, 1), -1),
        ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r0, 1, 2, %p1;", (-1, 1), 2),
        ("setp.gt.s32 %p1, %r1, 0; mov.b32 %r0, 5; @!%p1 mov.b32 %r0, 7;", (-1,), 7),
        ("cvt.s64.s32 %rd2, %r1; shr.s64 %rd2, %rd2, 8; cvt.u32.u64 %r0, %rd2;", (-256,), -1),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r0, {%rs2, %rs1};", (0x10002,), 0x20001),
    ],
)
def test_integers(body, numbers, expected):
    assert one(body, *numbers) == expected


NAN, TINY = np.float32("nan"), np.float32(1e-40)


@pytest.mark.parametrize(
    ("body", "numbers", "expected"),
    [
        ("max.f32 %r0, %r1, %r2;", (NAN, 1), 1),
        ("add.f32 %r0, %r1, %r2;", (TINY, 0), TINY),
        ("add.ftz.f32 %r0, %r1, %r2;", (TINY, 0), 0),
        ("mov.b32 %r5, 0x40004000; mul.f16x2 %r0, %r1, %r5;", (2**-7,), 2),  # halves 0 and 1 -> 2
        ("fma.rn.f32 %r0, %r1, %r1, %r2;", (1 + 2**-12, -1 - 2**-11), 2**-24),
        ("ex2.approx.ftz.f32 %r0, %r1;", (-3,), 0.125),
        ("ex2.approx.ftz.f32 %r0, %r1;", (-130,), 0),
        ("rsqrt.approx.ftz.f32 %r0, %r1;", (0.0625,), 4),
        ("setp.gt.f32 %p1, %r1, %r2; selp.f32 %r0, %r3, %r4, %p1;", (NAN, 1, 2, 3), 3),
        ("setp.leu.f32 %p1, %r1, %r2; selp.f32 %r0, %r3, %r4, %p1;", (NAN, 1, 2, 3), 2),
        ("setp.num.f32 %p1, %r1, %r2; selp.f32 %r0, %r3, %r4, %p1;", (NAN, 1, 2, 3), 3),
    ],
)
def test_floats(body, numbers, expected):
    assert one(body, *numbers, dtype=np.float32) == expected


@pytest.mark.parametrize(
    ("body", "exact", "bound"),
    [
        ("ex2.approx.ftz.f32 %r0, %r1;", np.exp2, 2**-22),
        ("rsqrt.approx.ftz.f32 %r0, %r1;", lambda x: 1 / np.sqrt(x), 2**-22),
        ("div.full.f32 %r0, 0f3F800000, %r1;", lambda x: 1 / x, 2**-22),
    ],
)
def test_approximations_err_as_much_as_they_may(body, exact, bound):
    given = torch.zeros(4096, 4)
    given[:, 0] = torch.linspace(0.1, 3, 4096)
    found = run(body, given.view(torch.int32), threads=4096).view(np.float32)
    truth = exact(given[:, 0].double().numpy())
    error = np.abs(found / truth - 1)
    assert bound / 4 < error.max() < bound


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_to_16_bits(kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    given = torch.randn(4096, 4) * torch.logspace(-9, 6, 4096)[:, None]
    given[:4, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1 + 2**-8])
    found = run(f"cvt.rn.{kind}x2.f32 %r0, %r2, %r1;", given.view(torch.int32), threads=4096)
    found = torch.from_numpy(found.view(np.int16).copy()).view(dtype).view(-1, 2)
    assert torch.equal(found.nan_to_num(7), given[:, :2].to(dtype).nan_to_num(7))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 %r0, %r99, 3, 31, -1;", lambda lane: lane ^ 3),
        ("shfl.sync.up.b32 %r0, %r99, 2, 0, -1;", lambda lane: lane - 2 * (lane > 1)),
        ("shfl.sync.down.b32 %r0, %r99, 2, 31, -1;", lambda lane: lane + 2 * (lane < 30)),
        ("shfl.sync.idx.b32 %r0, %r99, 5, 31, -1;", lambda lane: 5 + 0 * lane),
        ("redux.sync.add.s32 %r0, %r99, -1;", lambda lane: 496 + 0 * lane),
    ],
)
def test_exchanges_within_a_warp(body, expected):
    assert (run(body) == expected(np.arange(32))).all()


@pytest.mark.parametrize(("arch", "expected"), [(80, 1), (90, 1 + 2**-23)])
def test_tensor_cores_drop_what_lies_far_below_the_largest_term(arch, expected):
    """1 and four products of 2^-25, each less than what sm_80 keeps of it."""
    given = torch.zeros(32, 4)
    given[:, 2] = 1
    bits = given.view(torch.int32)
    two = torch.tensor([2.0**-13, 2.0**-13, 2.0**-12, 2.0**-12], dtype=torch.bfloat16)
    bits[::4, :2] = two.view(torch.int32)  # a[g, 0:2] and b[0:2, g]
    bits[1::4, :2] = two.view(torch.int32)  # [2:4]
    body = """
    mov.b32 %r5, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {%r0, %r6, %r7, %r8}, {%r1, %r5, %r5, %r5}, {%r2, %r5}, {%r3, %r3, %r3, %r3};
    """
    assert run(body, bits, arch=arch).view(np.float32)[0] == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r0, [%rd0+512];", "outside of all tensors, 0 bytes past given"),
        ("ld.global.v4.b32 {%r0, %r5, %r6, %r7}, [%rd0+8];", "not aligned to 16 bytes"),
        ("mov.b32 %r5, 1024; ld.shared.b32 %r0, [%r5];", "past the 1024 bytes of shared"),
        ("mov.b32 %r5, 2; st.shared.b32 [%r5], %r1;", "not aligned"),
        ("add.s32 %r0, %r50, 1;", "register %r50 is read before it is written"),
        ("setp.lt.u32 %p1, %r99, 16; @%p1 redux.sync.add.s32 %r0, %r1, -1;", "threads of a warp"),
        (
            "mov.b32 %r5, 0; @%p0 mbarrier.init.shared::cta.b64 [%r5], 1;"
            "$L_1: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r5], 0; @!%p1 bra $L_1;",
            "waits for ever",
        ),
        ("setp.lt.u32 %p1, %r99, 9; @%p1 bra $L_1; bar.sync 0; $L_1: bar.sync 0;", "each other"),
    ],
)
def test_what_a_gpu_would_not_survive(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_an_unknown_instruction_says_so():
    for opcode in ("sin.approx.f32", "max.NaN.f32", "div.approx.f32", "add.sat.s32"):
        with pytest.raises(NotImplementedError, match=f"no instruction {re.escape(opcode)} "):
            run(f"{opcode} %r0, %r1, %r2;")


def test_the_command_prints_faults(monkeypatch, capsys):
    options = SimpleNamespace(arch=["sm_80"], jobs=1)
    assert compiled.main(options, [PACK]) == 0
    assert capsys.readouterr().out == "1 op on sm_80: 0 faults\n"
    broken(monkeypatch, r"add\.s32", "sub.s32")
    assert compiled.main(options, [PACK]) == 1
    *found, said = capsys.readouterr().out.splitlines()
    assert found[0].startswith("pack, sm_80: ")
    assert said == f"1 op on sm_80: {len(found)} faults"
