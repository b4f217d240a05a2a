"""Norms, RoPE, SwiGLU and the linears against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import relative_error

from eagle.model.layers import (
    add_rms_norm,
    cat_rms_norm,
    gate_up_swiglu,
    linear,
    linear_add_rms_norm,
    rms_norm,
    rope_append,
    swiglu,
)
from eagle.model.triton_kernels.quantize import dequantize_weight, pack_gate_up, quantize_weight


def rms_by_loops(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = x.double().clone()
    for row in out.view(-1, x.shape[-1]):
        row /= math.sqrt(sum(value.item() ** 2 for value in row) / len(row) + eps)
    return out * weight.double()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_norms(dtype: torch.dtype, bound: float) -> None:
    x, residual = torch.randn(2, 3, 17).to(dtype), torch.randn(2, 3, 17).to(dtype)
    weight = torch.rand(17).to(dtype)
    assert relative_error(rms_norm(x, weight, 1e-5), rms_by_loops(x, weight, 1e-5)) < bound
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert relative_error(normed, rms_by_loops(total, weight, 1e-5)) < bound


def test_two_norms_side_by_side() -> None:
    first, second, weights = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.rand(2, 7)
    both = cat_rms_norm(first, weights[0], second, weights[1], 1e-5, 0.1)
    wanted = torch.cat((rms_by_loops(first, weights[0], 1e-5), rms_by_loops(second, weights[1], 0.1)), -1)
    assert relative_error(both, wanted) < 1e-6


def test_rope_append_rotates_pairs_and_writes_the_cache() -> None:
    batch, rows, size = 2, 3, 8
    q, k, v = (torch.randn(batch, rows, heads, size) for heads in (4, 2, 2))
    positions = torch.tensor([[0, 5, 9], [700, 2, 3]])
    angles = positions[..., None] * 10000.0 ** (-torch.arange(size // 2) / (size // 2))
    cos, sin = (torch.cat((part, part), -1) for part in (angles.cos(), angles.sin()))
    k_cache, v_cache = torch.full((batch, 2, 12, size), 7.0), torch.full((batch, 2, 12, size), 7.0)
    start = torch.tensor([4, 9])
    turned = rope_append(q, k, v, cos, sin, k_cache, v_cache, start)
    for b in range(batch):
        for t in range(rows):
            slot = start[b].item() + t
            assert torch.equal(v_cache[b, :, slot], v[b, t])
            for i in range(size // 2):
                angle = angles[b, t, i].item()
                turn = complex(math.cos(angle), math.sin(angle))
                for head in range(4):
                    wanted = complex(q[b, t, head, i].item(), q[b, t, head, i + size // 2].item()) * turn
                    got = complex(turned[b, t, head, i].item(), turned[b, t, head, i + size // 2].item())
                    assert abs(got - wanted) < 1e-5
                for head in range(2):
                    wanted = complex(k[b, t, head, i].item(), k[b, t, head, i + size // 2].item()) * turn
                    got = complex(k_cache[b, head, slot, i].item(), k_cache[b, head, slot, i + size // 2].item())
                    assert abs(got - wanted) < 1e-5
    assert k_cache[0, :, :4].eq(7.0).all()
    assert k_cache[0, :, 7:].eq(7.0).all()


def test_swiglu_and_linear() -> None:
    gate, up, weight, bias = torch.randn(3, 5), torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    wanted = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    assert relative_error(swiglu(gate, up), wanted) < 1e-6
    wanted = torch.stack([torch.stack([(row * column).sum() for column in weight]) for row in gate]) + bias
    assert relative_error(linear(gate, weight, bias), wanted) < 1e-6


def test_linear_with_norm_residual_and_one_byte_weight() -> None:
    x, weight, bias, residual = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4), torch.randn(2, 3, 4)
    norm = torch.rand(5)
    wanted = rms_by_loops(x, norm, 1e-5) @ weight.double().T + bias + residual
    out = linear(x, weight, bias, residual=residual, norm_weight=norm, eps=1e-5)
    assert relative_error(out, wanted) < 1e-6
    for dtype in (torch.int8, torch.float8_e4m3fn):
        small = quantize_weight(weight, dtype)
        wanted = x.double() @ dequantize_weight(small, torch.float32).double().T + bias
        assert relative_error(linear(x, small.values, bias, scale=small.scale), wanted) < 1e-6


def test_gate_up_swiglu() -> None:
    x, gate, up, norm = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4, 5), torch.rand(5)
    gate_bias, up_bias = torch.randn(4), torch.randn(4)
    normed = rms_by_loops(x, norm, 1e-5)
    left, right = normed @ gate.double().T + gate_bias, normed @ up.double().T + up_bias
    out = gate_up_swiglu(x, pack_gate_up(gate, up), pack_gate_up(gate_bias, up_bias), norm_weight=norm, eps=1e-5)
    assert relative_error(out, left / (1 + (-left).exp()) * right) < 1e-6


def test_linear_add_rms_norm() -> None:
    x, weight, bias, residual = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4), torch.randn(2, 3, 4)
    norm = torch.rand(4)
    normed, total = linear_add_rms_norm(x, weight, residual, norm, 1e-5, bias)
    wanted = x.double() @ weight.double().T + bias + residual
    assert relative_error(total, wanted) < 1e-6
    assert relative_error(normed, rms_by_loops(wanted, norm, 1e-5)) < 1e-6
