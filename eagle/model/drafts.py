"""The draft heads: the EAGLE-1/2 layer and the EAGLE-3 layer, run through the ops table.

Both pair the target's feature at position t with the embedding of token t + 1, sit at RoPE position t, and predict token
t + 2 (EAGLE, sec. 4.1). In the tree, the head's own output stands in for the features that do not exist yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle.errors import CheckpointError
from eagle.model.draft_config import DraftConfig
from eagle.model.kv_cache import KVCache, LayerShape
from eagle.model.layers import taken
from eagle.model.ops import Ops
from eagle.model.target import Target


@dataclass(frozen=True)
class DraftCall:
    """One pass of the head over its cache."""

    ops: Ops
    cache: KVCache
    start: torch.Tensor  # [B]: the first slot the new rows are written to
    kv_len: torch.Tensor  # [B] and
    tree_words: torch.Tensor | None  # [B, T, W]: as in the attention op
    positions: torch.Tensor  # [B, T]: RoPE positions
    slots: int  # host-side bound on the cache slots in use
    rope: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin [B, T, D] of the positions, if already known


class Norm(nn.Module):
    """An RMSNorm's weight; the ops table does the arithmetic."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE over the draft's cache. EAGLE-3's first layer feeds it twice the hidden size."""

    def __init__(self, config: DraftConfig, width: int) -> None:
        super().__init__()
        kv_size = config.num_kv_heads * config.head_dim
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], call: DraftCall, layer: int):
        ops, (k_cache, v_cache) = call.ops, call.cache.layers[layer]
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (_linear(ops, p, x).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = ops.rope_append(q, k, v, *rope, k_cache, v_cache, call.start)
        k_seen, v_seen = k_cache[:, :, : call.slots], v_cache[:, :, : call.slots]
        out = ops.attention(q, k_seen, v_seen, call.kv_len, call.tree_words, scale=self.scale)
        return _linear(ops, self.o_proj, out.flatten(2))


class MLP(nn.Module):
    """SwiGLU, or the activation the checkpoint names in SiLU's place."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        gate, up = _linear(ops, self.gate_proj, x), _linear(ops, self.up_proj, x)
        hidden = ops.swiglu(gate, up) if self.activation is None else self.activation(gate) * up
        return _linear(ops, self.down_proj, hidden)


class DraftLayer(nn.Module):
    """One decoder layer of the head.

    EAGLE-3's first: attention reads ``cat(input_layernorm(emb), hidden_norm(h))``. EAGLE-1/2's first: a plain layer
    without ``input_layernorm``. Further layers of either are plain.
    """

    def __init__(self, config: DraftConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fuses, self.index = config.kind == "eagle3" and index == 0, index
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = Norm(size, eps) if self.fuses or index > 0 else None
        self.hidden_norm = Norm(size, eps) if self.fuses else None
        self.self_attn = Attention(config, size * (2 if self.fuses else 1))
        self.post_attention_layernorm = Norm(size, eps)
        self.mlp = MLP(config)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, rope, call: DraftCall) -> torch.Tensor:
        ops, residual = call.ops, hidden
        if self.fuses:
            normed = self.hidden_norm(hidden, ops)
            residual = normed if self.norm_before_residual else hidden
            x = torch.cat((self.input_layernorm(embedded, ops), normed), dim=-1)
        else:
            x = hidden if self.input_layernorm is None else self.input_layernorm(hidden, ops)
        norm = self.post_attention_layernorm
        x, residual = ops.add_rms_norm(self.self_attn(x, rope, call, self.index), residual, norm.weight, norm.eps)
        return residual + self.mlp(x, ops)


class DraftModel(nn.Module):
    """A head in its canonical form; parameters carry the canonical tensor names."""

    def __init__(self, config: DraftConfig, *, own_lm_head: bool, own_embedding: bool) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        fc_in = config.feature_size if config.kind == "eagle3" else size + config.target_hidden_size
        self.fc = nn.Linear(fc_in, size, bias=config.fc_bias)
        self.layers = nn.ModuleList(DraftLayer(config, index) for index in range(config.num_layers))
        aux = max(1, len(config.aux_layers))
        norms = [Norm(config.target_hidden_size, eps) for _ in range(aux)]
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.input_norm = Norm(config.feature_size, eps) if config.norm_before_fc else None
        self.norm = Norm(size, eps) if config.kind == "eagle3" else None
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False) if own_lm_head else None
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if own_embedding else None
        trimmed = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if trimmed else None)
        self.register_buffer("inv_freq", None, persistent=False)
        self.rope_scale = 1.0

    def attach(self, target: Target) -> None:
        """Take what the checkpoint leaves to the target: embedding, lm_head, device and dtype.

        A missing ``lm_head`` becomes the target's rows of the draft vocabulary; the full one is called as a module, so
        that a quantised target works. Raises CheckpointError where the widths do not allow sharing.
        """
        output = target.model.get_output_embeddings()
        weight = output.weight
        dtype = weight.dtype if weight.is_floating_point() else target.layer_shapes[-1].dtype
        self.to(device=target.device, dtype=dtype)
        self.inv_freq, self.rope_scale = _rope_frequencies(self.config, target.device)
        if (self.lm_head is None or self.embed_tokens is None) and self.config.hidden_size != target.spec.hidden_size:
            raise CheckpointError(
                f"the head has hidden size {self.config.hidden_size} and stores no embedding or lm_head of its own, but "
                f"the target's have width {target.spec.hidden_size}: use a head that stores both"
            )
        self._embedding = (target.model.get_input_embeddings() if self.embed_tokens is None else self.embed_tokens,)
        self._embed = target.embed if self.embed_tokens is None else self.embed_tokens
        self._shared_rows = None
        if self.lm_head is None:
            if self.d2t is None:
                self._shared_head = output
            elif not weight.is_floating_point():
                raise CheckpointError(
                    "the head stores no lm_head and the target's is quantised, so its rows can't be shared: use a head "
                    "that stores its lm_head, or load the target without quantising lm_head"
                )
            else:
                self._shared_rows = weight.detach().to(target.device)[self.to_target(torch.arange(len(self.d2t)))]

    def to_target(self, ids: torch.Tensor) -> torch.Tensor:
        """Target-vocabulary ids of draft-vocabulary ids."""
        ids = ids.to(self.fc.weight.device)
        return ids if self.d2t is None else ids + self.d2t[ids]

    @property
    def target_ids(self) -> torch.Tensor | None:
        """The target-vocabulary id of each draft-vocabulary id, [draft_vocab_size] int64; None where they are equal."""
        return None if self.d2t is None else self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, features: torch.Tensor, ops: Ops) -> torch.Tensor:
        """What the layer takes for the target's features [B, T, F]: EAGLE-3's ``fc`` output, else they themselves."""
        features = features.to(self.fc.weight.dtype)
        if self.config.kind == "eagle1":
            return features
        if self.fc_norm is not None:
            parts = features.split(self.config.target_hidden_size, dim=-1)
            features = torch.cat([norm(part, ops) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.input_norm is not None:
            features = self.input_norm(features, ops)
        return _linear(ops, self.fc, features)

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, call: DraftCall, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One pass: hidden [B, R, H] (fused features, or this method's own output) and tokens [B, T] → [B, T, H].

        rows: [B, T] int64, the rows of ``hidden`` that the tokens continue; None for all of them in turn (T = R).
        """
        ops, embedded, hidden = call.ops, self._embed(tokens).to(hidden.dtype), taken(hidden, rows)
        if self.config.kind == "eagle1":
            hidden = _linear(ops, self.fc, torch.cat((embedded, hidden), dim=-1))
        rope = self.rope(call.positions) if call.rope is None else call.rope
        for layer in self.layers:
            hidden = layer(hidden, embedded, rope, call)
        return self.norm(hidden, ops) if self.config.norm_output and self.norm is not None else hidden

    def expand(
        self, hidden: torch.Tensor, tokens: torch.Tensor, call: DraftCall, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One level of a tree: `forward`'s output [B, T, H] and its logits [B, T, draft_vocab_size]."""
        hidden = self(hidden, tokens, call, rows)
        return hidden, self.logits(hidden, call.ops)

    def logits(self, hidden: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Draft-vocabulary logits of `forward`'s output: [..., H] → [..., draft_vocab_size]."""
        if self.norm is not None and not self.config.norm_output:
            hidden = self.norm(hidden, ops)
        if self.lm_head is not None:
            return _linear(ops, self.lm_head, hidden)
        if self._shared_rows is not None:
            return ops.linear(hidden, self._shared_rows)
        return self._shared_head(hidden).to(hidden.device)  # a spread target's lm_head lies on its last device

    @property
    def layer_shapes(self) -> list[LayerShape]:
        """What each layer of the head stores a position."""
        size, weight = self.config.head_dim, self.fc.weight
        return [LayerShape(self.config.num_kv_heads, size, size, weight.dtype, weight.device)] * self.config.num_layers

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """The head's own KV cache."""
        return KVCache(self.layer_shapes, batch, slots)

    def rope(self, positions: torch.Tensor, slots: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cos and sin [B, T, D] of ``positions`` [B, T], in the head's dtype. slots: of the cache in use."""
        dtype = self.fc.weight.dtype
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.rope_scale).to(dtype), (angles.sin() * self.rope_scale).to(dtype)


def _linear(ops: Ops, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, module.weight, module.bias)


def _rope_frequencies(config: DraftConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """RoPE's inverse frequencies [head_dim / 2] in float32, and the factor scaled variants put on cos and sin."""
    scaling = dict(config.rope_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return config.rope_theta**-exponent, 1.0
    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise CheckpointError(f"the head asks for RoPE scaling {kind!r}; expected default, linear, llama3 or yarn")
    parameters = {**scaling, "rope_type": kind, "rope_theta": config.rope_theta}
    host = SimpleNamespace(
        rope_parameters=parameters,
        rope_scaling=parameters,
        rope_theta=config.rope_theta,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    try:
        return ROPE_INIT_FUNCTIONS[kind](host, device)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"the head's RoPE scaling {scaling} lacks or garbles a value ({type(error).__name__}: {error}): "
            "complete it in the head's config.json"
        ) from error
