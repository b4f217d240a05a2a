"""Tiny random models and helpers for the tests."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from eagle.model.checkpoints import default_draft_config, random_draft
from eagle.model.draft_config import DraftConfig, TargetSpec
from eagle.model.drafts import DraftModel
from eagle.model.ea_model import EaModel
from eagle.model.loading import build_draft


def seeded(name: str) -> None:
    """Seed torch from a name."""
    torch.manual_seed(zlib.crc32(name.encode()))


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64, the numerator alone where ref is zero. NaN gives NaN, which no bound passes."""
    error, size = (out.double() - ref.double()).norm().item(), ref.double().norm().item()
    return error if size == 0.0 else error / size


def tiny_target(config: PretrainedConfig | None = None, spread: float = 4.0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM; ``spread`` scales its weights so that its outputs vary with the input."""
    if config is None:
        sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        config = LlamaConfig(**{**sizes, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(spread)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    return model


def tiny_draft_config(model: PreTrainedModel, kind: str = "eagle3", **overrides: Any) -> DraftConfig:
    """A head's configuration that fits ``model``."""
    config = model.config.get_text_config(decoder=True)
    spec = TargetSpec(config.hidden_size, config.vocab_size, config.num_hidden_layers)
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 20}
    return default_draft_config(spec, kind=kind, **{**sizes, **overrides})


def tiny_draft(model: PreTrainedModel, kind: str = "eagle3", spread: float = 4.0, **overrides: Any) -> DraftModel:
    """A random head with weights wide enough that its guesses vary."""
    state = random_draft(tiny_draft_config(model, kind, **overrides), seed=int(torch.randint(1 << 30, ()).item()))
    for name, tensor in state.tensors.items():
        if tensor.is_floating_point():
            state.tensors[name] = tensor.float() * (spread if tensor.dim() > 1 else 0.5 + torch.rand(tensor.shape))
    return build_draft(state)


def tiny_eagle(total_token: int = 20, depth: int = 3, top_k: int = 4, **target: Any) -> EaModel:
    """A random target and head, wired up."""
    model = tiny_target(**target)
    return EaModel(model, tiny_draft(model), total_token=total_token, depth=depth, top_k=top_k)
