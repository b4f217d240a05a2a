"""The draft head over packed weights: what `DraftModel` computes, in fewer launches and, if wanted, one-byte weights.

The target verifies every token, so the head's rounding can't change the output, only how often its guesses are right.
"""

from __future__ import annotations

import torch
from torch import nn

from eagle.model.draft_config import DraftConfig
from eagle.model.drafts import DraftCall, DraftLayer, DraftModel, Norm
from eagle.model.fused_layer import FusedLayer, LayerPass
from eagle.model.fused_support import Unfusable, is_plain_linear
from eagle.model.fused_weights import (
    NormWeight,
    PackedWeights,
    Product,
    QuantizedWeights,
    one_byte_dtype,
    packing,
    release,
)
from eagle.model.kv_cache import KVCache, LayerShape
from eagle.model.layers import taken
from eagle.model.ops import Ops
from eagle.model.rope_table import RopeTable


class FusedDraft:
    """An attached `DraftModel` behind the same methods.

    dtype: None packs the head's own weights in place (`release` undoes it); "int8" or "fp8" reads one-byte copies of
    them, the shared lm_head's rows included, and leaves the head as it is.

    Raises Unfusable for a head whose MLP is no SwiGLU, and InvalidInputError for another dtype or a GPU without it.
    """

    def __init__(self, draft: DraftModel, dtype: str | None = None) -> None:
        self.draft, config = draft, draft.config
        if any(layer.mlp.activation is not None for layer in draft.layers):
            raise Unfusable(f"the head's activation is {config.hidden_act!r}; the fused MLP computes silu")
        self._weights: PackedWeights | None = None
        if dtype is None:
            with packing(draft) as weights:
                self._weights = weights
                self._build(weights)
        else:
            self._build(QuantizedWeights(one_byte_dtype("draft_dtype", dtype, draft.fc.weight.device)))
        self._final = None if draft.norm is None else _norm(draft.norm)
        self.target_ids = draft.target_ids
        self._rope = RopeTable(draft.rope, draft.fc.weight.device)

    def _build(self, weights: PackedWeights | QuantizedWeights) -> None:
        draft = self.draft
        self._fc = weights.single(draft.fc)
        self.layers = [_fused_layer(layer, weights) for layer in draft.layers]
        self._head: Product | None = None
        if draft.lm_head is not None:
            self._head = weights.single(draft.lm_head)
        elif draft._shared_rows is not None:
            self._head = weights.rows(draft._shared_rows)
        elif is_plain_linear(draft._shared_head, draft.fc.weight.dtype, draft.fc.weight.device):
            self._head = weights.single(draft._shared_head)

    @property
    def config(self) -> DraftConfig:
        return self.draft.config

    @property
    def layer_shapes(self) -> list[LayerShape]:
        """`DraftModel.layer_shapes`."""
        return self.draft.layer_shapes

    @property
    def products(self) -> tuple[list[Product], list[Product]]:
        """The product that joins the head's inputs, and those of its layers and output. An output head that stays the
        target's own module is not among them."""
        layers = [one for layer in self.layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return [self._fc], [*layers, *([] if self._head is None else [self._head])]

    @property
    def one_byte(self) -> bool:
        """Whether the products run on one-byte copies."""
        return self._fc.scale is not None

    def intact(self) -> bool:
        """Whether the head still computes with the weights packed here; one-byte copies know nothing of later edits."""
        return self._weights is None or self._weights.intact()

    def release(self) -> None:
        """Give the head's parameters memory of their own again. This object can't run afterwards."""
        if self._weights is not None:
            weights, self._weights = self._weights, None
            self.layers = []
            release(self.draft, weights)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """`DraftModel.new_cache`."""
        self._rope.reserve(slots)
        return self.draft.new_cache(batch, slots)

    def rope(self, positions: torch.Tensor, slots: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., D] of ``positions`` [...], which lie below ``slots``, or those of a cache used before."""
        self._rope.reserve(slots)
        return self._rope(positions) if self._rope.rows else self.draft.rope(positions)

    @torch.no_grad()
    def fuse(self, features: torch.Tensor, ops: Ops) -> torch.Tensor:
        """`DraftModel.fuse`."""
        draft, features = self.draft, features.to(self.draft.fc.weight.dtype)
        if self.config.kind == "eagle1":
            return features
        if draft.fc_norm is not None:
            parts = features.split(self.config.target_hidden_size, dim=-1)
            normed = [ops.rms_norm(part, *_norm(norm)) for norm, part in zip(draft.fc_norm, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        if draft.input_norm is None:
            return self._fc(ops, features)
        return self._fc(ops, ops.rms_norm(features, *_norm(draft.input_norm)))

    @torch.no_grad()
    def __call__(
        self, hidden: torch.Tensor, tokens: torch.Tensor, call: DraftCall, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`DraftModel.forward`."""
        total, normed = self._pass(hidden, tokens, call, rows, self._final if self.config.norm_output else None)
        return total if normed is None else normed

    @torch.no_grad()
    def expand(
        self, hidden: torch.Tensor, tokens: torch.Tensor, call: DraftCall, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`DraftModel.expand`; the last norm rides in the product before it, as all others do."""
        total, normed = self._pass(hidden, tokens, call, rows, self._final)
        ready = total if normed is None else normed
        return (ready if self.config.norm_output else total), self._project(ready, call.ops)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, ops: Ops) -> torch.Tensor:
        """`DraftModel.logits`."""
        if self._final is not None and not self.config.norm_output:
            hidden = ops.rms_norm(hidden, *self._final)
        return self._project(hidden, ops)

    def _pass(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        call: DraftCall,
        rows: torch.Tensor | None,
        final: NormWeight | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream behind all layers [B, T, H] and its ``final`` norm, if there is one."""
        ops, config = call.ops, self.config
        self._rope.reserve(call.cache.slots)
        if config.kind == "eagle1":
            embedded = self._embed(tokens).to(hidden.dtype)
            hidden = self._fc(ops, torch.cat((embedded, taken(hidden, rows)), dim=-1))
            total, normed = hidden, hidden
        else:
            total, normed = self._paired(ops, hidden, rows, tokens)
        cos, sin = self.rope(call.positions) if call.rope is None else call.rope
        shared = LayerPass(ops, cos, sin, call.start, call.kv_len, call.tree_words, call.slots)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            following = final if last else self.layers[index + 1].input_norm
            total, normed = layer(total, normed, call.cache.layers[index], shared, following)
        return total, normed

    def _project(self, hidden: torch.Tensor, ops: Ops) -> torch.Tensor:
        if self._head is None:  # a quantised or spread target's own module
            return self.draft._shared_head(hidden).to(hidden.device)
        return self._head(ops, hidden)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        table = self._embedding_table(tokens.device)
        if table is not None:
            return table[tokens]  # 1.9 µs for ten rows, where F.embedding takes 5.9 (H100)
        return self.draft._embed(tokens)

    def _embedding_table(self, device: torch.device) -> torch.Tensor | None:
        """The embedding's weight, unless the module does more than look up a row on that device."""
        (module,) = self.draft._embedding
        return module.weight if type(module) is nn.Embedding and module.weight.device == device else None

    def _paired(
        self, ops: Ops, hidden: torch.Tensor, rows: torch.Tensor | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """EAGLE-3's residual stream [B, T, H] and attention input [B, T, 2 H]."""
        first = self.draft.layers[0]
        left, right = _norm(first.input_layernorm), _norm(first.hidden_norm)
        table = self._embedding_table(tokens.device)
        if table is not None and table.dtype == hidden.dtype and tokens.device == hidden.device:
            both, hidden = ops.draft_input(hidden, rows, tokens, table, left.weight, right.weight, left.eps, right.eps)
        else:
            hidden, embedded = taken(hidden, rows), self._embed(tokens).to(hidden.dtype)
            both = ops.cat_rms_norm(embedded, left.weight, hidden, right.weight, left.eps, right.eps)
        return (both[..., hidden.shape[-1] :] if first.norm_before_residual else hidden), both


def _fused_layer(layer: DraftLayer, weights: PackedWeights | QuantizedWeights) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    plain = layer.index > 0
    return FusedLayer(
        qkv=weights.stacked(attention.q_proj, attention.k_proj, attention.v_proj),
        o=weights.single(attention.o_proj),
        gate_up=weights.interleaved(mlp.gate_proj, mlp.up_proj),
        down=weights.single(mlp.down_proj),
        input_norm=_norm(layer.input_layernorm) if plain else None,
        post_norm=_norm(layer.post_attention_layernorm),
        q_heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        scale=attention.scale,
    )


def _norm(module: Norm) -> NormWeight:
    return NormWeight(module.weight, module.eps)
