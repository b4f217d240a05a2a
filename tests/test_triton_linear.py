"""The small-M linear against float64 products; on the GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import importlib
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error

from eagle.model import layers
from eagle.model.triton_kernels.linear import gate_up_swiglu, linear, linear_add_rms_norm
from eagle.model.triton_kernels.linear_config import (
    BLOCK_M,
    DeviceTraits,
    LinearConfig,
    choose,
    device_traits,
    fits,
    rule,
    tall,
)
from eagle.model.triton_kernels.quantize import dequantize_weight, pack_gate_up, pack_rows, quantize_weight

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ONE_BYTE = [torch.int8, torch.float8_e4m3fn]
H100 = DeviceTraits("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
EPS = 1e-5

CONFIGS = {
    "rule": None,
    "narrow": LinearConfig(16, 32, num_stages=3),
    "split": LinearConfig(32, 32, split_k=3),
    "more-splits-than-steps": LinearConfig(64, 64, split_k=8),
    "swap": LinearConfig(64, 32, swap=True),
    "swap-split": LinearConfig(64, 32, split_k=2, swap=True),
    "tall": LinearConfig(64, 32, split_k=2, block_m=128),
}
BY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN: whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def weight_like(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n, k, device=DEVICE) / k**0.5).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T


@BY_CONFIG
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 33, 40), (5, 70, 65), (64, 96, 128), (65, 17, 7)], ids=str)
def test_linear(sizes: tuple[int, int, int], dtype: torch.dtype, config: LinearConfig | None) -> None:
    m, n, k = sizes
    x, weight = normal(m, k, dtype=dtype), weight_like(n, k, dtype)
    bias, residual = normal(n, dtype=dtype), normal(m, n, dtype=dtype)
    assert relative_error(linear(x, weight, config=config), product(x, weight)) < BOUND[dtype]
    out = linear(x, weight, bias, config=config)
    assert out.dtype == dtype
    assert relative_error(out, product(x, weight) + bias.double()) < BOUND[dtype]
    assert torch.equal(linear(x, weight, bias, residual=residual, config=config), out + residual)


@BY_CONFIG
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ONE_BYTE, ids=["int8", "fp8"])
def test_one_byte_weights(kind: torch.dtype, dtype: torch.dtype, config: LinearConfig | None) -> None:
    x, weight, bias = normal(9, 72, dtype=dtype), weight_like(70, 72, dtype), normal(70, dtype=dtype)
    packed = quantize_weight(weight, kind)
    expected = product(x, dequantize_weight(packed, torch.float64)) + bias.double()
    out = linear(x, packed.values, bias, scale=packed.scale, config=config)
    assert relative_error(out, expected) < BOUND[dtype]


@BY_CONFIG
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_before_rounds_as_the_op(dtype: torch.dtype, config: LinearConfig | None) -> None:
    x, gain, weight = 3 * normal(6, 72, dtype=dtype), normal(72, dtype=dtype), weight_like(40, 72, dtype)
    out = linear(x, weight, norm_weight=gain, eps=0.5, config=config)
    assert relative_error(out, linear(layers.rms_norm(x, gain, 0.5), weight, config=config)) < BOUND[dtype] / 4
    exact = layers.rms_norm(x.double(), gain.double(), 0.5)
    assert relative_error(out, product(exact, weight)) < BOUND[dtype]


@BY_CONFIG
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
def test_gate_up_swiglu(normed: bool, dtype: torch.dtype, config: LinearConfig | None) -> None:
    x, gain, bias = normal(6, 72, dtype=dtype), normal(72, dtype=dtype), normal(74, dtype=dtype)
    gate, up = weight_like(37, 72, dtype), weight_like(37, 72, dtype)
    packed = pack_gate_up(gate, up)
    out = gate_up_swiglu(
        x, packed, pack_gate_up(bias[:37], bias[37:]), norm_weight=gain if normed else None, eps=EPS, config=config
    )
    source = layers.rms_norm(x.double(), gain.double(), EPS) if normed else x
    left, right = product(source, gate) + bias[:37].double(), product(source, up) + bias[37:].double()
    assert out.shape == (6, 37)
    assert relative_error(out, torch.nn.functional.silu(left) * right) < 2 * BOUND[dtype]


@BY_CONFIG
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, torch.int8], ids=["plain", "int8"])
def test_linear_add_rms_norm(kind: torch.dtype | None, dtype: torch.dtype, config: LinearConfig | None) -> None:
    x, weight, bias = normal(2, 3, 72, dtype=dtype), weight_like(50, 72, dtype), normal(50, dtype=dtype)
    residual, gain, scale = normal(2, 3, 50, dtype=dtype), normal(50, dtype=dtype), None
    if kind is not None:
        weight, scale = quantize_weight(weight, kind)
    out, total = linear_add_rms_norm(x, weight, residual, gain, EPS, bias, scale=scale, config=config)
    assert torch.equal(total, linear(x, weight, bias, scale=scale, residual=residual, config=config))
    assert relative_error(out, layers.rms_norm(total.double(), gain.double(), EPS)) < BOUND[dtype]


TIMED = {
    (6144, 4096): (128, 32, 5),
    (4096, 14336): (128, 64, 4),
    (28672, 4096): (128, 32, 1),
    (8192, 8192): (128, 64, 2),
}
"""float32 (N, K) → tile of N, step of K and parts that were the fastest on an H100."""


@pytest.mark.parametrize("shape", TIMED, ids=str)
def test_the_rule_gives_what_was_fastest_in_float32(shape: tuple[int, int]) -> None:
    found = rule(*shape, torch.float32, torch.float32, H100)
    assert (found.block_n, found.block_k, found.split_k) == TIMED[shape]
    assert found.swap


@given(
    n=st.integers(1, 300_000),
    k=st.integers(1, 40_000),
    sms=st.integers(1, 200),
    shared=st.sampled_from([101376, 232448]),
)
def test_the_rule_fits_float32_and_splits_only_idle_gpus(n: int, k: int, sms: int, shared: int) -> None:
    device = DeviceTraits("some GPU", (9, 0) if shared == 232448 else (8, 9), sms, shared)
    found = rule(n, k, torch.float32, torch.float32, device)
    assert fits(found, torch.float32, torch.float32, device)
    columns = -(-n // found.block_n)
    assert found.split_k == 1 or (columns * found.split_k <= 2 * sms and 128 * found.split_k <= k)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 90),
    k=st.integers(1, 90),
    half=st.booleans(),
    block=st.sampled_from([(16, 32), (32, 16), (64, 64)]),
    split_k=st.integers(1, 4),
    swap=st.booleans(),
)
def test_random_shapes(m: int, n: int, k: int, half: bool, block: tuple[int, int], split_k: int, swap: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    config = LinearConfig(*block, split_k=split_k, swap=swap and block[0] == 64)
    x, weight, residual = normal(m, k, dtype=dtype), weight_like(n, k, dtype), normal(m, n, dtype=dtype)
    total, added = product(x, weight), residual.double()
    error = linear(x, weight, residual=residual, config=config).double() - (total + added)
    assert error.norm() < BOUND[dtype] * (total.norm() + added.norm())  # the two may all but cancel


ONE_TILE = [(65, range(1, 65))] if HAS_GPU else [(16, (1, 2, 15)), (64, (31, 64))]
"""Rows of the whole, and of the parts it is compared with. numpy's matmul, which the interpreter calls, may round a row by
its place in the tile and by the tile's height; a tensor core does neither."""


@BY_CONFIG
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other(dtype: torch.dtype, config: LinearConfig | None) -> None:
    weight, gain, out_gain = weight_like(48, 70, dtype), normal(70, dtype=dtype), normal(48, dtype=dtype)

    def results(rows: torch.Tensor, added: torch.Tensor) -> list[torch.Tensor]:
        return [
            linear(rows, weight, norm_weight=gain, eps=EPS, config=config),
            gate_up_swiglu(rows, weight, config=config),
            *linear_add_rms_norm(rows, weight, added, out_gain, EPS, config=config),
        ]

    for most, counts in ONE_TILE:
        x, residual = normal(most, 70, dtype=dtype), normal(most, 48, dtype=dtype)
        whole = results(x, residual)
        for m in counts:
            place = m // 2
            source = (7 * m) % most if HAS_GPU else place
            rows, added = 40 * normal(m, 70, dtype=dtype), normal(m, 48, dtype=dtype)
            rows[place], added[place] = x[source], residual[source]
            for part, expected in zip(results(rows, added), whole, strict=True):
                assert torch.equal(part[place], expected[source])


def test_a_row_survives_neighbours_that_are_not_finite() -> None:
    x, weight = normal(3, 40, dtype=torch.float32), weight_like(20, 40, torch.float32)
    expected = linear(x, weight, config=CONFIGS["split"])
    x[1], x[2] = float("nan"), float("inf")
    assert torch.equal(linear(x, weight, config=CONFIGS["split"])[0], expected[0])


def test_strided_inputs_and_what_lies_between_them() -> None:
    wide = torch.full((4, 100), float("nan"), device=DEVICE)
    wide[:, :40] = torch.randn(4, 40)
    gate, up = weight_like(20, 40, torch.float32), weight_like(20, 40, torch.float32)
    packed = pack_gate_up(gate, up)
    residual = torch.full((4, 50), float("nan"), device=DEVICE)
    residual[:, :20] = 1.0
    out = linear(wide[:, :40], packed[1::2], residual=residual[:, :20])
    assert torch.equal(out, linear(wide[:, :40].contiguous(), up) + 1.0)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.int8])
def test_tma(kind: torch.dtype, swap: bool) -> None:
    if HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper's copy engine")
    x, weight, scale = normal(5, 80, dtype=torch.float16), weight_like(70, 80, torch.float16), None
    if kind == torch.int8:
        weight, scale = quantize_weight(weight, kind)
    plain = LinearConfig(64, 64, split_k=2, swap=swap)
    copied = LinearConfig(64, 64, split_k=2, swap=swap, tma=True)
    out = linear(x, weight, scale=scale, config=copied)
    assert torch.equal(out, linear(x, weight, scale=scale, config=plain))
    with pytest.raises(ValueError, match="16-byte"):
        linear(x[:, 1:], weight[:, 1:], scale=scale, config=copied)


def test_a_choice_yields_where_the_copy_engine_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper's copy engine")
    launcher = importlib.import_module("eagle.model.triton_kernels.linear")
    monkeypatch.setattr(launcher, "choose", lambda *_, **__: LinearConfig(64, 32, tma=True))
    x, weight = normal(5, 41, dtype=torch.float16), weight_like(20, 41, torch.float16)
    for left, right in ((x[:, 1:], weight[:, 1:]), (x[:, 1:].contiguous(), weight[:, 1:])):
        assert torch.equal(linear(left, right), linear(left, right, config=LinearConfig(64, 32)))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", ONE_BYTE, ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)], ids=str)
def test_every_value_of_a_byte_is_exact(kind: torch.dtype, dtype: torch.dtype, swap: bool) -> None:
    codes = torch.arange(-128, 128, device=DEVICE).to(torch.int8)
    if kind == torch.float8_e4m3fn:
        codes[[127, 255]] = 0  # NaN otherwise
    codes = codes.view(kind).view(2, 128)
    scale, one_each = torch.ones(2, device=DEVICE), torch.eye(128, dtype=dtype, device=DEVICE)
    out = linear(one_each, codes, scale=scale, config=LinearConfig(64, 128, num_stages=2, swap=swap))
    assert torch.equal(out.float(), codes.to(torch.float32).T)


def test_no_rows() -> None:
    x, weight = torch.empty(2, 0, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    assert linear(x, weight).shape == (2, 0, 6)
    assert gate_up_swiglu(x, weight).shape == (2, 0, 3)
    empty = torch.empty(2, 0, 6, device=DEVICE)
    config = CONFIGS["split"]
    assert linear_add_rms_norm(x, weight, empty, torch.ones(6, device=DEVICE), EPS, config=config)[0].shape == (2, 0, 6)


def test_refusals_name_the_shapes() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    scale = torch.ones(6, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(3, 8\) and weight \(6, 7\)"):
        linear(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"\(6, 8\) torch.float16"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"scale \[6\] float32"):
        linear(x, weight.to(torch.int8))
    with pytest.raises(ValueError, match="no scale"):
        linear(x, weight, scale=scale)
    with pytest.raises(ValueError, match=r"scale is \(5,\)"):
        linear(x, weight.to(torch.int8), scale=scale[:5])
    with pytest.raises(ValueError, match=r"bias is \(8,\)"):
        linear(x, weight, x[0])
    with pytest.raises(ValueError, match=r"residual is \(3, 8\).*expected \(3, 6\)"):
        linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="contiguous K"):
        linear(x, weight.T.contiguous().T)
    with pytest.raises(ValueError, match="float64"):
        linear(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"norm_weight is \(6,\)"):
        linear(x, weight, norm_weight=scale)
    with pytest.raises(ValueError, match=r"weight is \(5, 8\)"):
        gate_up_swiglu(x, weight[:5])


@pytest.mark.parametrize("kind", ONE_BYTE, ids=["int8", "fp8"])
def test_quantising_keeps_each_row_within_its_step(kind: torch.dtype) -> None:
    weight = torch.randn(9, 33) * torch.logspace(-6, 3, 9)[:, None]
    weight[4] = 0.0
    packed = quantize_weight(weight, kind)
    error = (dequantize_weight(packed, torch.float32) - weight).abs()
    peak = weight.abs().amax(1, keepdim=True)
    bound = peak / 254 if kind == torch.int8 else weight.abs() / 16 + peak / 448 / 512
    assert (error <= bound * 1.001).all()
    assert packed.values[4].float().eq(0).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight / 0.0, kind)
    with pytest.raises(ValueError, match="expected a float"):
        quantize_weight(weight[0], kind)


def test_packing() -> None:
    q, k, v = (torch.randn(rows, 12, device=DEVICE) for rows in (16, 4, 4))
    x, packed = torch.randn(3, 12, device=DEVICE), pack_rows(q, k, v)
    separate = torch.cat([linear(x, part, config=CONFIGS["narrow"]) for part in (q, k, v)], -1)
    assert relative_error(linear(x, packed, config=CONFIGS["narrow"]), separate) < 1e-6
    both = pack_gate_up(k, v)
    assert torch.equal(both[0::2], k)
    assert torch.equal(both[1::2], v)
    with pytest.raises(ValueError, match=r"\(16, 12\)"):
        pack_gate_up(q, k)
    with pytest.raises(ValueError, match=r"one K"):
        pack_rows(q, k[:, :3])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "shape", [(6144, 4096), (4096, 14336), (128256, 4096), (960, 576), (576, 1536), (7, 5)], ids=str
)
def test_choice_fits_the_device(shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    dtype = torch.float32 if weight_dtype == torch.float32 else torch.bfloat16
    for device in (H100, DeviceTraits("small", (8, 6), 28, 101376), device_traits(torch.device("cpu"))):
        for chosen in (choose(*shape, dtype, weight_dtype, device), rule(*shape, dtype, weight_dtype, device)):
            assert chosen.shared_memory(dtype.itemsize, weight_dtype.itemsize) <= device.shared_memory
            assert not (chosen.tma or chosen.prefetch) or device.capability >= (9, 0)
            assert min(chosen.block_n, chosen.block_k) >= 16
    assert BLOCK_M == 64


def test_registered_ops() -> None:
    x, weight, residual = (torch.randn(*s, device=DEVICE) for s in ((3, 20), (6, 20), (3, 6)))
    gain, norm_gain = torch.rand(20, device=DEVICE), torch.rand(6, device=DEVICE)
    values, scale = quantize_weight(weight, torch.int8)
    ops = torch.ops.eagle
    torch.library.opcheck(ops.linear.default, (x, weight))
    torch.library.opcheck(
        ops.linear.default,
        (x, values, residual[0]),
        {"scale": scale, "residual": residual, "norm_weight": gain, "eps": EPS},
    )
    torch.library.opcheck(ops.gate_up_swiglu.default, (x, weight), {"norm_weight": gain, "eps": EPS})
    torch.library.opcheck(ops.linear_add_rms_norm.default, (x, weight, residual, norm_gain, EPS))


EIGHT_B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32000, 4096)]
SMALL = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, *ONE_BYTE], ids=str)
@pytest.mark.parametrize("shape", EIGHT_B + SMALL, ids=str)
def test_model_sizes_and_every_number_of_rows(shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    n, k = shape
    dtype = weight_dtype if weight_dtype not in ONE_BYTE else torch.bfloat16
    x, weight, scale = normal(64, k, dtype=dtype), weight_like(n, k, dtype), None
    if weight_dtype in ONE_BYTE:
        packed = quantize_weight(weight, weight_dtype)
        (weight, scale), wide = packed, dequantize_weight(packed, torch.float64)
    else:
        wide = weight
    out = linear(x, weight, scale=scale)
    assert relative_error(out, product(x, wide)) < BOUND[dtype]
    for m in range(1, 64, 1 if n * k < 1 << 24 else 9):
        assert torch.equal(linear(x[-m:], weight, scale=scale), out[-m:])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, *ONE_BYTE], ids=str)
@pytest.mark.parametrize("shape", EIGHT_B[:4] + SMALL[:4] + [(2048, 8192), (3072, 3072)], ids=str)
def test_the_rows_of_many_trees_are_those_of_one(shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    """Other tiles serve them; again and again, since a race shows in few launches."""
    n, k = shape
    dtype = weight_dtype if weight_dtype not in ONE_BYTE else torch.bfloat16
    x, weight, scale = normal(480, k, dtype=dtype), weight_like(n, k, dtype), None
    if weight_dtype in ONE_BYTE:
        weight, scale = quantize_weight(weight, weight_dtype)
    residual, gain = normal(480, n, dtype=dtype), normal(n, dtype=dtype)

    def results(start: int, stop: int) -> list[torch.Tensor]:
        rows = x[start:stop]
        return [
            linear(rows, weight, scale=scale),
            gate_up_swiglu(rows, weight, scale=scale),
            *linear_add_rms_norm(rows, weight, residual[start:stop], gain, EPS, scale=scale),
        ]

    apart = [torch.cat(parts) for parts in zip(*(results(at, at + 60) for at in range(0, 480, 60)), strict=True)]
    for m in (65, 128, 240, 300, 480):
        for _ in range(10):
            for together, expected in zip(results(0, m), apart, strict=True):
                assert torch.equal(together, expected[:m])


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, *ONE_BYTE, torch.float32], ids=str)
@given(m=st.integers(1, 2000), n=st.integers(1, 4000), k=st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_taller_tiles_keep_the_parts_of_k(weight_dtype: torch.dtype, m: int, n: int, k: int) -> None:
    dtype = weight_dtype if weight_dtype not in ONE_BYTE else torch.bfloat16
    n, k = 16 * n, 16 * k
    config = choose(n, k, dtype, weight_dtype, H100)
    found = tall(config, m, n, k, dtype, weight_dtype, H100)
    assert (found.split_k, found.swap) == (config.split_k, config.swap)
    assert found.split_k == 1 or found.part_of_k(k) == config.part_of_k(k)
    assert fits(found, dtype, weight_dtype, H100)
    assert m > BLOCK_M or found == config
    if found != config:
        assert dtype != torch.float32
        assert -(-m // found.block_m) * found.block_m < m + 128


def test_taller_tiles_where_they_were_timed() -> None:
    def tile(m: int, n: int, k: int, weight_dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
        config = choose(n, k, torch.bfloat16, weight_dtype, H100)
        found = tall(config, m, n, k, torch.bfloat16, weight_dtype, H100)
        return found.block_m, found.block_n

    assert [tile(240, n, k) for n, k in EIGHT_B[:4]] == [(128, 128), (128, 64), (256, 128), (128, 64)]
    assert [tile(480, n, k) for n, k in EIGHT_B[:4]] == [(256, 128), (128, 128), (256, 128), (128, 128)]
    assert [tile(240, n, k, torch.int8) for n, k in EIGHT_B[:4]] == [(128, 64), (128, 64), (256, 64), (128, 64)]
    assert tile(120, 960, 576)[0] == BLOCK_M
    assert tile(60, 28672, 4096)[0] == BLOCK_M
    ampere = DeviceTraits("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)
    config = choose(28672, 4096, torch.bfloat16, torch.bfloat16, ampere)
    assert tall(config, 240, 28672, 4096, torch.bfloat16, torch.bfloat16, ampere) == config


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_captured_in_a_graph() -> None:
    x, residual = normal(10, 4096, dtype=torch.bfloat16), normal(10, 4096, dtype=torch.bfloat16)
    weight, gain = weight_like(4096, 4096, torch.bfloat16), normal(4096, dtype=torch.bfloat16)
    linear_add_rms_norm(x, weight, residual, gain, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, total = linear_add_rms_norm(x, weight, residual, gain, EPS)
    x.copy_(normal(10, 4096, dtype=torch.bfloat16))
    graph.replay()
    expected = linear_add_rms_norm(x, weight, residual, gain, EPS)
    assert torch.equal(out, expected[0])
    assert torch.equal(total, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("k", [576, 4096])
def test_launches_that_overlap_wait_for_each_other(k: int) -> None:
    weights = [weight_like(k, k, torch.bfloat16) for _ in range(8)]
    x, gain = normal(60, k, dtype=torch.bfloat16), torch.ones(k, dtype=torch.bfloat16, device=DEVICE)

    def chain(wait: bool) -> torch.Tensor:
        out, total = x, x
        for weight in weights:
            out, total = linear_add_rms_norm(out, weight, total, gain, EPS)
            out = linear(out, weight)
            if wait:
                torch.cuda.synchronize()
        return out

    expected = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(wait=False)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_new_thread_can_begin_with_a_product() -> None:
    x, weight = torch.randn(64, 256, device="cuda").half(), torch.randn(128, 256, device="cuda").half()
    wanted = linear(x, weight)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(linear, x, weight).result(), wanted)
