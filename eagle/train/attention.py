"""Attention for packed documents: plain causal, and the one of EAGLE-3's training-time test.

At step j of the training-time test a row t sees the keys K0[s], s ≤ t, of its own document, made from true features,
and one key of each later step, K1[t] ... Kj[t], made from the head's own outputs at that row (EAGLE-3, sec. 3). So the
scores are one causal block and j diagonals. Two backends:

- "flash": FlashAttention over K0 with its log-sum-exp; the diagonals are merged in by log-sum-exp. The backward pass
  hands FlashAttention the merged output and log-sum-exp, from which it recomputes exactly K0's share of the merged
  softmax (as ring attention does); the diagonals' gradients are elementwise.
- "dense": documents are padded to the longest and all scores are formed. For the CPU, and as the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """Documents laid one after another in N rows."""

    offsets: Tensor
    """int32 [docs + 1] on the device: where each document begins, then N."""
    longest: int
    lengths: list[int]

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str) -> Packing:
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        if torch.device(device).type == "cuda":
            offsets = offsets.pin_memory().to(device, non_blocking=True)
        return cls(offsets, max(lengths), list(lengths))

    def padded_index(self) -> tuple[Tensor, Tensor]:
        """Rows [docs, longest] (0 where padded) and which of them are real, bool [docs, longest]."""
        steps = torch.arange(self.longest, device=self.offsets.device)
        starts, ends = self.offsets[:-1, None].long(), self.offsets[1:, None].long()
        index = starts + steps
        real = index < ends
        return index.where(real, torch.zeros_like(index)), real


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, backend: str) -> Tensor:
    """Causal attention inside each document: q [N, H, D], k and v [N, Hkv, D] → [N, H, D]; no gradient."""
    if backend == "flash":
        return _flash_forward(q, k, v, packing, scale)[0]
    index, real = packing.padded_index()
    out = torch.nn.functional.scaled_dot_product_attention(
        q[index].transpose(1, 2),
        k[index].transpose(1, 2),
        v[index].transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)[real]


def ttt_attention(
    q: Tensor, keys: list[Tensor], values: list[Tensor], packing: Packing, scale: float, backend: str
) -> Tensor:
    """Training-time-test attention of step ``len(keys) - 1``, differentiable.

    Args:
        q: [N, H, D], already rotated.
        keys: K0 ... Kj, each [N, Hkv, D], already rotated.
        values: V0 ... Vj, each [N, Hkv, D].
        packing: where documents begin.
        scale: the factor on the scores.
        backend: "flash" or "dense".

    Returns:
        [N, H, D].
    """
    if backend == "flash":
        return _FlashTTT.apply(packing, scale, q, *keys, *values)
    return _dense_ttt(q, keys, values, packing, scale)


def _dense_ttt(q: Tensor, keys: list[Tensor], values: list[Tensor], packing: Packing, scale: float) -> Tensor:
    group = q.shape[1] // keys[0].shape[1]
    index, real = packing.padded_index()
    q = q.float()
    expanded = [k.float().repeat_interleave(group, 1) for k in keys]
    expanded_v = [v.float().repeat_interleave(group, 1) for v in values]
    causal = torch.ones(packing.longest, packing.longest, dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bthd,bshd->bhts", q[index], expanded[0][index]) * scale
    scores = scores.masked_fill(~causal, float("-inf"))
    own = [(q * k).sum(-1)[index].transpose(1, 2)[..., None] * scale for k in expanded[1:]]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1)
    out = torch.einsum("bhts,bshd->bthd", weights[..., : packing.longest], expanded_v[0][index])
    for i, v in enumerate(expanded_v[1:]):
        out = out + weights[..., packing.longest + i].transpose(1, 2)[..., None] * v[index]
    return out[real].to(keys[0].dtype)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> tuple[Tensor, ...]:
    """Output [N, H, D], log-sum-exp [H, N] fp32, and FlashAttention's two random-state tensors."""
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, packing.offsets, packing.offsets, packing.longest, packing.longest, 0.0, True, False, scale=scale
    )
    return out[0], out[1], out[2], out[3]


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: list[Tensor],
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for a softmax with log-sum-exp ``lse`` [H, N] and output ``out`` [N, H, D]."""
    offsets, longest = packing.offsets, packing.longest
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, offsets, offsets, longest, longest, 0.0, True, *state, scale=scale
    )


def _merge(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Add one key a row to a softmax: out [N, H, D] fp32, lse [N, H] fp32, k and v [N, Hkv, D]."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(rows, kv_heads, -1, dim).float()
    score = (grouped * k.float()[:, :, None]).sum(-1).view(rows, heads) * scale
    merged = torch.logaddexp(lse, score)
    own = (score - merged).exp().view(rows, kv_heads, -1, 1) * v.float()[:, :, None]
    return out * (lse - merged).exp()[..., None] + own.view(rows, heads, dim), merged


def _diagonal_grad(
    grad_q: Tensor, grad: Tensor, delta: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through one diagonal; grad_q [N, H, D] fp32 comes back with its share added."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped_q = q.view(rows, kv_heads, -1, dim).float()
    grouped = grad.view(rows, kv_heads, -1, dim).float()
    keys, values = k.float()[:, :, None], v.float()[:, :, None]
    score = (grouped_q * keys).sum(-1) * scale
    weight = (score - lse.view(rows, kv_heads, -1)).exp()
    grad_score = weight * ((grouped * values).sum(-1) - delta.view(rows, kv_heads, -1)) * scale
    grad_v = (weight[..., None] * grouped).sum(2).to(v.dtype)
    grad_k = (grad_score[..., None] * grouped_q).sum(2).to(k.dtype)
    return grad_q + (grad_score[..., None] * keys).view(rows, heads, dim), grad_k, grad_v


class Fused:
    """The elementwise parts of the flash backend; :func:`compile_parts` swaps in compiled versions."""

    merge: Callable[..., tuple[Tensor, Tensor]] = staticmethod(_merge)
    diagonal_grad: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(_diagonal_grad)


def compile_parts(enabled: bool) -> None:
    """Serve the elementwise parts by ``torch.compile``, or eagerly."""
    Fused.merge = staticmethod(torch.compile(_merge, dynamic=False) if enabled else _merge)
    Fused.diagonal_grad = staticmethod(torch.compile(_diagonal_grad, dynamic=False) if enabled else _diagonal_grad)


class _FlashTTT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packing: Packing, scale: float, q: Tensor, *kv: Tensor) -> Tensor:
        steps = len(kv) // 2
        keys, values = kv[:steps], kv[steps:]
        first, lse, *state = _flash_forward(q, keys[0], values[0], packing, scale)
        out, lse = first, lse.t().contiguous()
        if steps > 1:
            out = first.float()
            for k, v in zip(keys[1:], values[1:], strict=True):
                out, lse = Fused.merge(out, lse, q, k, v, scale)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, *kv)
        ctx.packing, ctx.scale, ctx.state = packing, scale, state
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *kv = ctx.saved_tensors
        steps = len(kv) // 2
        keys, values = kv[:steps], kv[steps:]
        grad = grad.contiguous()
        grad_q, grad_k0, grad_v0 = _flash_backward(
            grad, q, keys[0], values[0], out, lse.t().contiguous(), ctx.state, ctx.packing, ctx.scale
        )
        grads_k, grads_v = [grad_k0], [grad_v0]
        if steps > 1:
            delta = (grad.float() * out.float()).sum(-1)
            grad_q = grad_q.float()
            for k, v in zip(keys[1:], values[1:], strict=True):
                grad_q, grad_k, grad_v = Fused.diagonal_grad(grad_q, grad, delta, lse, q, k, v, ctx.scale)
                grads_k.append(grad_k)
                grads_v.append(grad_v)
        return (None, None, grad_q.to(q.dtype), *grads_k, *grads_v)


def check_flash(heads: int, kv_heads: int, dim: int, device: torch.device) -> str | None:
    """Compare the flash backend with the dense one on a small input, values and gradients.

    Returns:
        None where they agree within bf16's rounding, else what went wrong, in words.
    """
    generator = torch.Generator().manual_seed(0)
    packing = Packing.of([37, 1, 90, 64], device)

    def make(count: int) -> Tensor:
        values = torch.randn(192, count, dim, generator=generator)
        return values.to(device, torch.bfloat16).requires_grad_()

    q = make(heads)
    keys, values = [make(kv_heads) for _ in range(4)], [make(kv_heads) for _ in range(4)]
    weight = torch.randn(192, heads, dim, generator=generator).to(device)
    results = []
    for backend in ("dense", "flash"):
        try:
            out = ttt_attention(q, keys, values, packing, dim**-0.5, backend)
            grads = torch.autograd.grad((out.float() * weight).sum(), [q, *keys, *values])
        except (RuntimeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        results.append([out, *grads])
    worst = max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(*results, strict=True))
    return None if worst < 0.03 else f"relative difference {worst:.3g} from dense attention"
