"""What test_ops.py cannot say for every op: linear's bits whatever the batch, and when oneDNN
multiplies."""

import importlib
import itertools
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from bert_fast.kernels import launch, linear, qkv
from bert_fast.kernels.launch import DTYPES, INTERPRET

file = importlib.import_module("bert_fast.kernels.linear")
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
KERNELS = GPU or INTERPRET


def operands(T, K, N, dtype):
    torch.manual_seed(0)
    x = torch.randn(T, K, device=DEVICE).to(dtype)
    weight = (torch.randn(N, K, device=DEVICE) / K**0.5).to(dtype)
    return x, weight, torch.randn(N, device=DEVICE).to(dtype)


def launched_on(arch, dtype, monkeypatch, request):
    """(arch, dtype, precision) of launches from here on: for arch, but on a GPU for that one, in a
    form that no table chooses; TF32 is allowed where dtype is "tf32"."""
    if GPU:
        arch = file.launch.arch()
    monkeypatch.setattr(file.launch, "_gpus", lambda: False)
    monkeypatch.setattr(file.launch, "arch", lambda: arch)
    if dtype == "tf32":
        request.getfixturevalue("tf32")
        dtype = torch.float32
    return arch, dtype, file.product_precision(torch.empty(0, dtype=dtype))


# -- the same bits whatever the batch ------------------------------------------------------
@pytest.mark.skipif(not KERNELS, reason="libraries choose their sums by the number of rows")
@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.usefixtures("sums_without_place")
@torch.no_grad()
def test_a_row_has_the_same_bits_in_any_batch(activation, dtype, arch, monkeypatch, request):
    """Alone, in another order, with other rows behind, in every form of tile that there is, by rows
    of the weight and by columns."""
    arch, dtype, precision = launched_on(arch, dtype, monkeypatch, request)
    x, weight, bias = operands(131, 200, 96, dtype)
    residual = torch.randn(131, 96, device=DEVICE).to(dtype)
    expected = linear(x, weight, bias, activation, residual)
    for rows in ([0], [130], [64, 3], list(range(7)), list(range(130, -1, -1))):
        ours = linear(x[rows], weight, bias, activation, residual[rows])
        assert torch.equal(ours, expected[rows]), rows
    count = torch.tensor([70], device=DEVICE)
    ours = linear(x, weight, bias, activation, residual, num_tokens=count)
    assert torch.equal(ours[:70], expected[:70])
    for form, start in itertools.product(
        file._forms(arch, dtype.itemsize, precision), (0, file.COLUMNS_FROM)
    ):
        monkeypatch.setattr(file, "_tile", lambda *_, form=form: form)
        monkeypatch.setattr(file, "COLUMNS_FROM", start)
        assert torch.equal(linear(x, weight, bias, activation, residual), expected), form


@pytest.mark.skipif(not KERNELS, reason="of the kernel")
@pytest.mark.usefixtures("tf32")
@torch.no_grad()
def test_tf32_loses_what_it_must_and_no_more():
    x, weight, bias = operands(70, 200, 96, torch.float32)
    truth = F.linear(*(t.double() for t in (x, weight, bias)))
    error = (linear(x, weight, bias).double() - truth).abs()
    # Each factor is within half an ulp of ten bits.
    most = x.abs().double() @ weight.abs().double().mT * 2**-10
    assert (error <= most + 1e-6).all()
    assert error.max() > 100 * torch.finfo(torch.float32).eps  # that it was TF32


@pytest.mark.skipif(not KERNELS, reason="of the kernel")
@pytest.mark.usefixtures("tf32")
@torch.no_grad()
def test_tf32_is_rounded_to_the_nearest():
    """What is cut instead is always less: by 2^-10 in the mean, which is not zero over layers."""
    x, weight, _ = (t.abs() for t in operands(70, 200, 96, torch.float32))
    truth = F.linear(x.double(), weight.double())
    assert (linear(x, weight).double() / truth - 1).mean().abs() < 2**-13
    ulp = 2**-10
    x = torch.tensor([1 + ulp / 2, -1 - ulp / 2, 1 + ulp / 2 - 2**-23, 1 + 1.5 * ulp])
    y = linear(x[:, None].to(DEVICE), torch.ones(1, 1, device=DEVICE))[:, 0]
    assert y.tolist() == [1 + ulp, -1 - ulp, 1, 1 + 2 * ulp]  # halves go away from zero


@pytest.mark.skipif(not KERNELS, reason="of the kernel")
@pytest.mark.usefixtures("tf32")
@torch.no_grad()
def test_tf32_leaves_infinity_and_nan_what_they_are():
    bits = [0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, -0x800000, -1]
    x = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    y = linear(x[:, None], torch.ones(1, 1, device=DEVICE))[:, 0]
    assert y.isnan().tolist() == x.isnan().tolist() == [False, True, True, True, False, False, True]
    assert y[[0, 4]].tolist() == [torch.inf] * 2  # the largest number is past TF32's
    assert y[5] == -torch.inf


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize(
    "itemsize, precision", [(2, "ieee"), (4, "ieee"), (4, "tf32"), (4, "bf16x6")]
)
def test_every_form_takes_the_same_instruction(itemsize, precision, arch):
    """sm_90 multiplies in another way from 64 rows and four warps on. fp32 adds up steps of K."""
    forms = file._forms(arch, itemsize, precision)
    for M, N, _, warps, _ in forms:
        assert M >= 64 and N >= 16 and warps >= 4
    if precision in ("ieee", "bf16x6") and itemsize == 4:
        assert len({K for _, _, K, *_ in forms}) == 1


@pytest.mark.parametrize(
    "arch, setting, dtype, expected",
    [
        (90, "none", torch.float32, "bf16x6"), (80, "none", torch.float32, "bf16x6"),
        (90, "ieee", torch.float32, "ieee"), (90, "tf32", torch.float32, "tf32"),
        (89, "none", torch.float32, "ieee"), ("gfx942", "none", torch.float32, "ieee"),
        (90, "none", torch.float16, "ieee"), (90, "tf32", torch.bfloat16, "ieee"),
    ],
)  # fmt: skip
def test_fp32_is_split_where_that_is_faster_and_torch_is_not_told_otherwise(
    arch, setting, dtype, expected, monkeypatch
):
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "arch", lambda: arch)
    monkeypatch.setattr(launch, "fp32_precision", lambda: setting)
    assert file.product_precision(torch.ones(1, dtype=dtype)) == expected


def test_a_form_is_chosen_by_shape_and_architecture(monkeypatch):
    monkeypatch.setattr(file.launch, "INTERPRET", False)
    monkeypatch.setattr(file, "_tile", file._tile.__wrapped__)

    monkeypatch.setattr(file.launch, "_gpus", lambda: False)  # whose table may say otherwise

    def form(T, N, arch=90, itemsize=2, precision="ieee", multiprocessors=132, parts=1):
        gpu = arch, multiprocessors
        _, tile = file.config_of("linear", T, N, 768, itemsize, precision, *gpu, parts)
        return tile["BLOCK_M"], tile["BLOCK_N"]

    assert form(16384, 768) == (128, 256)
    assert form(8192, 768) == (128, 128)  # 192 of 128 x 256 would leave a third idle
    assert form(16384, 768, arch=80) == (64, 128)
    assert form(16384, 768, arch=120) == (64, 128)  # has less shared memory
    assert form(512, 768) == (64, 64)
    assert form(128, 3072) == (64, 64)
    assert form(128, 768) == (64, 16)
    assert form(1, 1) == (64, 16)
    assert form(1, 1, arch="gfx942") == (64, 64)
    assert form(16384, 768, itemsize=4) == (64, 128)
    assert form(512, 768, itemsize=4) == (64, 64)
    assert form(128, 768, itemsize=4) == (64, 32)
    assert form(16384, 768, itemsize=4, precision="tf32") == (128, 128)
    assert form(128, 768, multiprocessors=58) == (64, 32)
    assert form(16384, 1024, arch="gfx942") == (128, 128)
    assert form(8192, 768, arch="gfx942", multiprocessors=304) == (64, 64)
    assert form(4096, 768, parts=3) == (128, 128)  # a third of the SMs for 96 or 192 tiles
    assert form(16384, 768, parts=3) == (128, 256)


@pytest.mark.parametrize(
    "T, arch, itemsize, persists",
    [(16384, 90, 2, 1), (4096, 90, 2, 1), (128, 90, 2, 0), (16384, 80, 2, 0), (16384, 90, 4, 0),
     (16384, "gfx942", 2, 0)],
)  # fmt: skip
def test_programs_persist_where_there_are_many_tiles_and_descriptors(
    T, arch, itemsize, persists, monkeypatch
):
    monkeypatch.setattr(file.launch, "INTERPRET", False)
    monkeypatch.setattr(file, "_tile", file._tile.__wrapped__)
    monkeypatch.setattr(file.launch, "_gpus", lambda: False)
    for precision in ("ieee", "tf32")[: itemsize // 2]:
        found, _ = file.config_of("linear", T, 3072, 768, itemsize, precision, arch, 132)
        assert found == persists


# -- oneDNN --------------------------------------------------------------------------------
@pytest.fixture
def onednn(monkeypatch):
    """The calls of oneDNN's products, on a CPU with AVX-512 that is not Intel's."""
    if file._product is None:
        pytest.skip("this torch has no oneDNN, or calls its product by another name")
    calls = []
    product, product_and_add = file._product, file._product_and_add
    monkeypatch.setattr(file, "_product", lambda *a: calls.append("product") or product(*a))
    monkeypatch.setattr(
        file, "_product_and_add", lambda *a: calls.append("and add") or product_and_add(*a)
    )
    monkeypatch.setattr(launch, "AVX512", True)
    monkeypatch.setattr(launch, "INTEL", False)
    return calls


@pytest.mark.skipif(KERNELS, reason="oneDNN is for the CPU's own implementation")
@torch.no_grad()
def test_onednn_is_taken_and_may_be_switched_off(onednn, monkeypatch):
    args = operands(5, 128, 128, torch.float32)
    residual = torch.randn(5, 128)
    linear(*args)
    linear(*args, "gelu")
    linear(*args, residual=residual)
    linear(*args, "gelu", residual)
    assert onednn == ["product", "product", "and add", "product"]
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(*args), F.linear(*args))
    linear(args[0], args[1].mT.contiguous().mT, args[2])  # slow there, as is the next
    linear(*args, residual=residual.mT.contiguous().mT)
    linear(*operands(5, 8, 8, torch.float32))  # not worth it
    assert len(onednn) == 4
    monkeypatch.setattr(launch, "AVX512", False)  # nor there
    linear(*args)
    assert len(onednn) == 4


@pytest.mark.skipif(KERNELS, reason="oneDNN is for the CPU's own implementation")
@torch.no_grad()
def test_on_intels_avx512_long_products_that_nothing_follows_are_mkls(onednn, monkeypatch):
    monkeypatch.setattr(launch, "INTEL", True)
    few, many = (operands(T, 128, 128, torch.float32) for T in (file.SHORT, file.SHORT + 1))
    assert torch.equal(linear(*many), F.linear(*many))
    assert not onednn
    linear(*few)
    linear(*many, "gelu")
    linear(*many, residual=torch.randn(file.SHORT + 1, 128))
    assert onednn == ["product", "product", "and add"]


@pytest.mark.skipif(KERNELS, reason="of the CPU's own implementation")
def test_without_onednn_there_is_torch(monkeypatch):
    broken = mock.Mock(default=mock.Mock(side_effect=RuntimeError))
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", broken)
    assert file._find_products() == (None, None)


# -- gradients -----------------------------------------------------------------------------
@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
def test_gradients_of_what_is_asked_for_alone(needed):
    x, weight, bias = operands(13, 160, 128, torch.float32)
    inputs = {"x": x, "weight": weight, "bias": bias, "residual": torch.randn_like(x[:, :128])}
    leaf = inputs[needed].requires_grad_()
    (ours,) = torch.autograd.grad(linear(**inputs, activation="gelu").square().sum(), leaf)
    exact = {k: t.detach().double() for k, t in inputs.items()}
    leaf = exact[needed].requires_grad_()
    y = F.gelu(F.linear(exact["x"], exact["weight"], exact["bias"])) + exact["residual"]
    (truth,) = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_more_rows_than_the_kernels_count_are_refused():
    x, weight = torch.empty(2**31, 1, device="meta"), torch.empty(2, 1, device="meta")
    bias = torch.empty(2, device="meta")
    for name, multiply in (
        ("linear", lambda: linear(x, weight, bias)),
        ("qkv", lambda: qkv(x, *(weight, bias) * 3)),
    ):
        with pytest.raises(ValueError, match=rf"{name}: x must have less than 2\^31 rows, got"):
            multiply()


def test_rows_that_overlap_get_no_tensor_descriptor():
    x = torch.zeros(1, 64, dtype=torch.float16).expand(128, 64)
    assert not file.describable(90, "ieee", (x, x.stride(0)))
    assert file.describable(90, "ieee", (x.contiguous(), 64))
