"""The EAGLE-3 head as it is trained: canonical parameter names, packed documents, training-time test.

Layer: ``x = cat(input_layernorm(emb), hidden_norm(h))``, attention over x with residual h, then
``post_attention_layernorm`` and a SwiGLU MLP with residual; the recurrent state is the layer's output before ``norm``
(EAGLE-3; SafeAILab's reference). During training ``fc`` reads features divided by ``feature_scale``, their
root-mean-square by channel: residual streams differ in size by orders of magnitude, and Adam's steps do not. The
scale is folded into ``fc.weight`` on export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle.model.draft_config import DraftConfig
from eagle.train.attention import Packing, ttt_attention

RIDGE = 0.1
"""Strength of the regression that starts ``fc``, a share of the number of samples."""


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def _layer_parts(config: DraftConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The layer before and after attention, as functions of tensors alone."""
    heads, kv_heads, dim, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps

    def before(
        emb: Tensor, hidden: Tensor, positions: Tensor, inv_freq: Tensor, norms: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat([_rms(emb, norms[0], eps), _rms(hidden, norms[1], eps)], dim=-1)
        q, k, v = (F.linear(x, weight.to(x.dtype)) for weight in weights)
        angles = positions.float()[:, None] * inv_freq
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        rows = x.shape[0]
        return (
            _rotate(q.view(rows, heads, dim), cos, sin),
            _rotate(k.view(rows, kv_heads, dim), cos, sin),
            v.view(rows, kv_heads, dim),
        )

    def after(attention: Tensor, hidden: Tensor, norms: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        o, gate, up, down = (weight.to(hidden.dtype) for weight in weights)
        hidden = hidden + F.linear(attention.reshape(hidden.shape[0], -1), o)
        x = _rms(hidden, norms[0], eps)
        hidden = hidden + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return hidden, _rms(hidden, norms[1], eps)

    return before, after


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class _Weights(nn.Module):
    """A group of named bias-free linear weights."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (rows, columns) in shapes.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))

    def tensors(self) -> list[Tensor]:
        return [module.weight for module in self.children()]


class _Layer(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        wide = config.intermediate_size
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (_Norm(hidden) for _ in range(3))
        self.self_attn = _Weights(
            q_proj=(q, 2 * hidden), k_proj=(kv, 2 * hidden), v_proj=(kv, 2 * hidden), o_proj=(hidden, q)
        )
        self.mlp = _Weights(gate_proj=(wide, hidden), up_proj=(wide, hidden), down_proj=(hidden, wide))


class Eagle3Head(nn.Module):
    """Parameters in fp32 under their canonical names; computes in the features' dtype.

    Args:
        config: the head's sizes.
        share_lm_head: no ``lm_head`` of its own; the target's rows of the draft vocabulary serve, frozen.
    """

    def __init__(self, config: DraftConfig, *, share_lm_head: bool) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([_Layer(config)])
        self.norm = _Norm(config.hidden_size)
        if not share_lm_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("feature_scale", torch.ones(config.feature_size))
        frequencies = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-frequencies, persistent=False)
        self._eager = _layer_parts(config)
        self._parts = self._eager

    def compile_parts(self, enabled: bool) -> None:
        """Serve the layer by ``torch.compile`` in training mode, or eagerly."""
        self._parts = tuple(torch.compile(part, dynamic=False) for part in self._eager) if enabled else self._eager

    @torch.no_grad()
    def initialise(
        self, features: Tensor, positions: Tensor, hidden: Tensor, norm: Tensor, lm_head: Tensor, seed: int
    ) -> None:
        """Set the parameters from a seed and the target.

        ``fc`` starts as the ridge regression from a position's features to the target's last state at the next
        position, so that the head begins with a linear guess instead of noise.

        Args:
            features: [N, feature_size], packed documents.
            positions: int64 [N].
            hidden: the target's final hidden states after the norm [N, target_hidden_size].
            norm: the target's final norm weight [target_hidden_size].
            lm_head: the target's rows of the draft vocabulary [draft_vocab, target_hidden_size].
            seed: of the random values.
        """
        generator = torch.Generator().manual_seed(seed)
        features = features.float()
        # A few tokens, the first ones above all, carry activations hundreds of times larger than the rest.
        size = features.square().mean(-1).sqrt()
        usual = size < 4 * size.median()
        scale = features[usual].square().mean(0).sqrt().clamp_min(1e-3)
        self.feature_scale.copy_(scale)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if self.config.hidden_size != self.config.target_hidden_size:
            return
        follows = usual[:-1] & usual[1:] & (positions[1:] == positions[:-1] + 1)
        x = features[:-1][follows] / scale
        y = hidden[1:][follows].float() / norm.float()
        ridge = RIDGE * len(x) * torch.eye(x.shape[1])
        self.fc.weight.copy_(torch.linalg.solve(x.t() @ x + ridge, x.t() @ y).t())
        # A linear guess deserves less confidence than the target's own state.
        self.norm.weight.copy_(norm * 0.6)
        if hasattr(self, "lm_head"):
            self.lm_head.weight.copy_(lm_head)

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor,
        tokens: Tensor,
        positions: Tensor,
        packing: Packing,
        backend: str,
        steps: int,
    ) -> list[Tensor]:
        """Training-time test.

        Args:
            features: the target's [N, feature_size].
            embeddings: the target's table [vocab, hidden].
            tokens: int64 [N].
            positions: int64 [N].
            packing: where documents begin.
            backend: of the attention.
            steps: how often the head runs on its own output, the first time included.

        Returns:
            For each step the normed hidden states [N, hidden] whose logits row t predict token t + 2 + step.
        """
        before, after = self._parts if self.training else self._eager
        layer = self.layers[0]
        attention, mlp = layer.self_attn.tensors(), layer.mlp.tensors()
        hidden = F.linear((features / self.feature_scale).to(features.dtype), self.fc.weight.to(features.dtype))
        norms_in = [layer.input_layernorm.weight, layer.hidden_norm.weight]
        norms_out = [layer.post_attention_layernorm.weight, self.norm.weight]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs = []
        for step in range(steps):
            emb = F.embedding(tokens.roll(-1 - step), embeddings).to(features.dtype)
            q, k, v = before(emb, hidden, positions + step, self.inv_freq, norms_in, attention[:3])
            keys.append(k)
            values.append(v)
            mixed = ttt_attention(q, keys, values, packing, self.config.head_dim**-0.5, backend)
            hidden, normed = after(mixed, hidden, norms_out, [attention[3], *mlp])
            outputs.append(normed)
        return outputs

    @torch.no_grad()
    def canonical_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters under their canonical names on the CPU, ``feature_scale`` folded into ``fc.weight``."""
        tensors = {name: parameter.detach().float() for name, parameter in self.named_parameters()}
        tensors["fc.weight"] = tensors["fc.weight"] / self.feature_scale
        return {name: tensor.to(dtype).cpu().contiguous() for name, tensor in tensors.items()}
