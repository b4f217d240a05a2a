"""A Llama-like decoder layer in six launches: qkv, RoPE with the cache append, attention, o, gate and up, down.

The residual adds ride in the products, and each norm in the product before it. The other way, norms in the products
behind them, each of whose programs reads all of x once more, took 23.0 µs a layer against 15.9 at SmolLM2-135M's sizes and
122 against 105 at those of a 3B Llama (the four products, 64 rows, bfloat16, H100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from eagle.model.fused_weights import NormWeight, Product
from eagle.model.ops import Ops


class LayerPass(NamedTuple):
    """What all layers of one pass share."""

    ops: Ops
    cos: torch.Tensor  # [B, T, D]
    sin: torch.Tensor  # [B, T, D]
    start: torch.Tensor  # [B]: the first cache slot the new rows are written to
    kv_len: torch.Tensor  # [B] and
    tree_words: torch.Tensor | None  # [B, T, W]: as in the attention op
    slots: int  # host-side bound on the cache slots in use


@dataclass(frozen=True)
class FusedLayer:
    """Products, norms and sizes of one layer."""

    qkv: Product  # [(Hq + 2 Hkv) D, K]
    o: Product
    gate_up: Product  # rows in turn
    down: Product
    input_norm: NormWeight | None  # of the residual stream; None where the caller makes the qkv product's input
    post_norm: NormWeight
    q_heads: int
    kv_heads: int
    scale: float
    q_norm: NormWeight | None = None  # over a head, before RoPE (Qwen3)
    k_norm: NormWeight | None = None
    window: int | None = None

    def __call__(
        self,
        total: torch.Tensor,
        normed: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        call: LayerPass,
        following: NormWeight | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream [B, T, H] behind the layer and its ``following`` norm, if there is one.

        total: the stream before it; normed: the qkv product's input; cache: this layer's k and v [B, Hkv, S, D].
        """
        ops = call.ops
        attended = self._attention(self.qkv(ops, normed), cache, call)
        normed, total = self.o.add_norm(ops, attended, total, self.post_norm)
        hidden = self.gate_up.swiglu(ops, normed)
        if following is None:
            return self.down(ops, hidden, residual=total), None
        normed, total = self.down.add_norm(ops, hidden, total, following)
        return total, normed

    def _attention(self, qkv: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], call: LayerPass) -> torch.Tensor:
        ops, (k_cache, v_cache) = call.ops, cache
        heads = qkv.view(*qkv.shape[:2], self.q_heads + 2 * self.kv_heads, -1)
        q, k, v = heads.split((self.q_heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = ops.rms_norm(q, *self.q_norm), ops.rms_norm(k, *self.k_norm)
        q = ops.rope_append(q, k, v, call.cos, call.sin, k_cache, v_cache, call.start)
        k_seen, v_seen = k_cache[:, :, : call.slots], v_cache[:, :, : call.slots]
        out = ops.attention(q, k_seen, v_seen, call.kv_len, call.tree_words, scale=self.scale, window=self.window)
        return out.flatten(2)
