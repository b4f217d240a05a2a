"""Which Hugging Face models can be driven, and the words for those that cannot."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from eagle.errors import UnsupportedModelError

UNBOUNDED_CONTEXT = 1 << 20
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""A forward's parameter for the cache: from transformers 5.24 on, and before."""


def check_config(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Refuse, before anything runs, a model whose configuration rules it out."""
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; a decoder-only causal LM is needed")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if odd:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(odd)}; only {' and '.join(sorted(ATTENTION_LAYERS))} can be drafted "
            "for: use a decoder whose layers are all of these types"
        )
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{name} uses chunked attention, which has no tree form here: use another target")
    parameters = inspect.signature(model.forward).parameters
    for wanted in (("position_ids",), CACHE_ARGUMENTS, ("logits_to_keep",)):
        if not any(argument in parameters for argument in wanted):
            raise UnsupportedModelError(
                f"{name}.forward takes no {' or '.join(map(repr, wanted))}, which a tree pass needs: use a model whose "
                "transformers class does"
            )


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which the model's forward takes a cache. `check_config` has seen that it has one."""
    parameters = inspect.signature(model.forward).parameters
    return next(argument for argument in CACHE_ARGUMENTS if argument in parameters)


def check_attention_call(model: PreTrainedModel, config: PretrainedConfig, calls: list[dict[str, Any]]) -> None:
    """Refuse a model whose layers do not all attend through the attention interface, or ask it for something more."""
    name, layers = type(model).__name__, config.num_hidden_layers
    if len(calls) != layers:
        raise UnsupportedModelError(
            f"{name} called transformers' attention interface {len(calls)} times in a pass of {layers} layers; "
            "each layer must call it once: use a model whose transformers class supports custom attention"
        )
    types = getattr(config, "layer_types", None) or [None] * layers
    for index, (call, kind) in enumerate(zip(calls, types, strict=True)):
        if call.get("s_aux") is not None:
            raise UnsupportedModelError(f"{name} layer {index} uses attention sinks, which no op here serves")
        if call["attention_mask"] is not None:
            raise UnsupportedModelError(
                f"{name} layer {index} makes an attention mask of its own; a tree can't be added"
            )
        if kind == "sliding_attention" and call.get("sliding_window") is None:
            raise UnsupportedModelError(f"{name} layer {index} slides its window through a mask, which no op here sees")


def decoder_layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The list of the model's decoder layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder if isinstance(decoder, nn.Module) else model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0:
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {count} decoder layers (num_hidden_layers); features can't be tapped"
    )


def context_length(config: PretrainedConfig) -> int:
    """Positions the model may use.

    RoPE of type longrope changes all frequencies once a sequence grows beyond the original maximum, which a tree's
    deeper nodes would cross before its shallower ones: such a model is used up to that maximum.
    """
    limit = getattr(config, "max_position_embeddings", None) or UNBOUNDED_CONTEXT
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if part.get("rope_type", part.get("type")) == "longrope":
            original = part.get("original_max_position_embeddings")
            limit = min(limit, original or getattr(config, "original_max_position_embeddings", None) or limit)
    return limit


def has_experts(model: nn.Module) -> bool:
    """Whether the model is a mixture of experts: transformers calls their module so, or its class."""
    named = model.named_modules()
    return any(name.rpartition(".")[2] == "experts" or "moe" in type(module).__name__.lower() for name, module in named)
