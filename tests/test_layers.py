"""Norms, RoPE and SwiGLU against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import relative_error

from eagle.model.layers import add_rms_norm, linear, rms_norm, rope_append, swiglu


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
