"""The canonical description of a draft head, whatever tool wrote its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TargetSpec:
    """What a head must fit: the target's sizes."""

    hidden_size: int
    vocab_size: int
    num_layers: int


@dataclass(frozen=True)
class DraftConfig:
    """Sizes and switches of one draft head.

    ``kind`` "eagle1" is the EAGLE-1/2 layer: ``h = fc(cat(emb, feature))``, one plain decoder layer without an
    ``input_layernorm``, logits by the target's ``lm_head``. "eagle3" is the EAGLE-3 layer: ``fc`` fuses
    ``len(aux_layers)`` target features, attention reads ``cat(norm(emb), norm(h))``, logits by the head's own
    ``lm_head`` over ``draft_vocab_size`` tokens.
    """

    kind: Literal["eagle1", "eagle3"]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """The target's vocabulary."""
    draft_vocab_size: int
    """Equal to ``vocab_size`` where the head has no vocabulary of its own."""
    target_hidden_size: int
    """Width of one target feature."""
    num_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face rope parameters, or None for plain RoPE (SafeAILab's choice whatever the target scales)."""
    max_position_embeddings: int = 2048
    """Only read by scaled RoPE; positions beyond it work."""
    hidden_act: str = "silu"
    aux_layers: tuple[int, ...] = ()
    """Which residual streams feed ``fc``: i means the *input* of target layer i; ``num_layers`` of the target means the
    last layer's output before the final norm. Empty: the last hidden state after the final norm (EAGLE-1/2)."""
    fc_bias: bool = False
    qkv_bias: bool = False
    norm_before_residual: bool = False
    """EAGLE-3: the residual is ``hidden_norm(h)`` rather than ``h``."""
    norm_output: bool = False
    """EAGLE-3.1: the hidden state fed to the next draft step is the one *after* the final norm."""
    fc_norm: bool = False
    """EAGLE-3.1: one RMSNorm for each target feature before ``fc``."""
    norm_before_fc: bool = False
    """One RMSNorm (``input_norm``) over the concatenated features before ``fc``."""

    @property
    def feature_size(self) -> int:
        """Width of the concatenated target features, ``fc``'s input for EAGLE-3."""
        return self.target_hidden_size * max(1, len(self.aux_layers))
