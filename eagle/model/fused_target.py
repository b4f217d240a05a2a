"""The fused route of Llama-like targets: the weights of transformers' modules, our layers, few launches.

It computes what `Target.forward` computes through transformers, in another order of sums. Norms, products, RoPE and
attention all come from the ops table, so on a CPU it runs in plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from eagle.model.fused_layer import FusedLayer, LayerPass
from eagle.model.fused_support import check_fusable, norm_weight
from eagle.model.fused_weights import (
    NormWeight,
    PackedWeights,
    Product,
    QuantizedWeights,
    one_byte_dtype,
    packing,
    release,
)
from eagle.model.kv_cache import KVCache
from eagle.model.ops import Ops
from eagle.model.rope_table import RopeTable
from eagle.model.target import Target


def fuse_target(target: Target, dtype: str | None = None) -> FusedTarget:
    """Have ``target`` run by the fused route from now on; `Target.unfuse` undoes it. dtype: see `FusedTarget`.

    Called again with the same dtype, it does nothing unless the model's weights have been put elsewhere since
    (`FusedTarget.intact`). Raises what `FusedTarget` raises.
    """
    if target.fused is not None and not (target.fused.dtype == dtype and target.fused.intact()):
        target.unfuse()
    if target.fused is None:
        target.fused = FusedTarget(target, dtype)
    return target.fused


class FusedTarget:
    """A target's layers over packed weights (`fused_weights`).

    dtype: None packs the model's own weights in place; "int8" or "fp8" reads one-byte copies of the products, rounded by
    output channel, beside the model's own. Raises Unfusable for a target whose layers are others, and InvalidInputError
    for another dtype or a GPU without it.
    """

    def __init__(self, target: Target, dtype: str | None = None) -> None:
        check_fusable(target)
        self.target, self.dtype = target, dtype
        self._weights: PackedWeights | QuantizedWeights | None
        if dtype is None:
            with packing(target.model) as self._weights:
                self._build(self._weights)
        else:
            self._weights = QuantizedWeights(one_byte_dtype("target_dtype", dtype, target.device))
            self._build(self._weights)

    def _build(self, weights: PackedWeights | QuantizedWeights) -> None:
        target, base = self.target, self.target.model.model
        self.layers = [
            _fused_layer(layer, weights, target.windows[index], target.layer_shapes[index].heads)
            for index, layer in enumerate(base.layers)
        ]
        self._lm_head = weights.single(target.model.lm_head)
        self._embedding, self._norm = base.embed_tokens.weight, norm_weight(base.norm)
        self._rope = RopeTable(self._angles, target.device, limit=target.context_length)
        if target.device.type == "cuda":
            torch.cuda.empty_cache()  # the parts' old memory, in pieces too small for anything else

    def intact(self) -> bool:
        """Whether the model still computes with the weights packed here. Moving or casting it, or loading by
        assignment, ends that: then `release` this and fuse again."""
        base = self.target.model.model
        same = base.embed_tokens.weight is self._embedding and base.norm.weight is self._norm.weight
        return same and self._weights is not None and self._weights.intact()

    def release(self) -> None:
        """Give the model's parameters memory of their own again. This object can't run afterwards."""
        if self._weights is not None:
            weights, self._weights = self._weights, None
            self.layers = []
            if isinstance(weights, PackedWeights):
                release(self.target.model, weights)

    @property
    def products(self) -> list[Product]:
        """All products of a pass."""
        return [
            *(one for layer in self.layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down)),
            self._lm_head,
        ]

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        kv_len: torch.Tensor,
        *,
        depths: torch.Tensor | None = None,
        tree_words: torch.Tensor | None = None,
        slots: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        ops: Ops | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Target.forward`."""
        ops, aux = self.target.ops if ops is None else ops, self.target.aux_layers
        self._rope.reserve(cache.slots)
        offsets = torch.arange(tokens.shape[1], device=tokens.device) if depths is None else depths
        cos, sin = self._rope(kv_len[:, None] + offsets)
        call = LayerPass(ops, cos, sin, kv_len, kv_len, tree_words, cache.slots if slots is None else slots)
        total = F.embedding(tokens, self._embedding)
        normed = ops.rms_norm(total, *self._input_norm(0))
        taps: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            taps[index] = total
            following = self._input_norm(index + 1)
            total, normed = layer(total, normed, cache.layers[index], call, following)
        taps[len(self.layers)] = total
        if not aux:
            taps[-1] = normed
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = normed[:, kept]
        keys = aux or (-1,)
        features = taps[keys[0]] if len(keys) == 1 else torch.cat([taps[key] for key in keys], dim=-1)
        return self._lm_head(ops, last), features

    def _input_norm(self, index: int) -> NormWeight:
        """The norm of the stream before layer ``index``; the final one behind the last layer."""
        norm = self.layers[index].input_norm if index < len(self.layers) else self._norm
        assert norm is not None
        return norm

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(0, dtype=self._embedding.dtype, device=positions.device)
        return self.target.model.model.rotary_emb(like, positions)


def _fused_layer(
    layer: nn.Module, weights: PackedWeights | QuantizedWeights, window: int | None, kv_heads: int
) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = weights.stacked(attention.q_proj, attention.k_proj, attention.v_proj)
    head_norms = {}
    if hasattr(attention, "q_norm"):
        head_norms = {"q_norm": norm_weight(attention.q_norm), "k_norm": norm_weight(attention.k_norm)}
    return FusedLayer(
        qkv=qkv,
        o=weights.single(attention.o_proj),
        gate_up=weights.interleaved(mlp.gate_proj, mlp.up_proj),
        down=weights.single(mlp.down_proj),
        input_norm=norm_weight(layer.input_layernorm),
        post_norm=norm_weight(layer.post_attention_layernorm),
        q_heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=kv_heads,
        scale=attention.scaling,
        window=window,
        **head_norms,
    )
