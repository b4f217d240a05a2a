"""Which targets the fused route takes, and the words for those it does not. Checked with transformers 5.17, 5.23 and 5.24.

The route computes what four of transformers' classes compute. A model that is not exactly one of them, or that somebody
has changed, keeps the general route.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle.errors import EagleError
from eagle.model.fused_weights import NormWeight
from eagle.model.target import Target

FAMILIES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}
"""The prefix of the class names and the package in ``transformers.models``."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Unfusable(EagleError, ValueError):
    """A model the fused route does not take; the message says why. The general route serves it."""


def check_fusable(target: Target) -> None:
    """Raise Unfusable unless the model is one of the known classes, unchanged, on one device and in one dtype."""
    model = target.model
    prefix = _family(model)
    classes = vars(sys.modules[type(model).__module__])
    _check_untouched(model)
    _expect(model.model, classes[f"{prefix}Model"], "model")
    _expect(model.model.norm, classes[f"{prefix}RMSNorm"], "model.norm")
    _expect(model.model.rotary_emb, classes[f"{prefix}RotaryEmbedding"], "model.rotary_emb")
    _expect(model.model.embed_tokens, nn.Embedding, "model.embed_tokens")
    _expect(model.lm_head, nn.Linear, "lm_head")
    if model.model.embed_tokens.max_norm is not None:
        raise Unfusable("model.embed_tokens rescales its weights as it is read (max_norm)")
    kind = model.model.rotary_emb.rope_type
    if kind in LENGTH_DEPENDENT_ROPE:
        raise Unfusable(f"RoPE of type {kind!r} changes its frequencies with the sequence's length")
    if target.config.hidden_act not in ("silu", "swish"):
        raise Unfusable(f"the MLP's activation is {target.config.hidden_act!r}; the fused MLP computes silu")
    for index, layer in enumerate(model.model.layers):
        _check_layer(layer, f"model.layers.{index}", prefix, classes)
    _check_tensors(target)


def norm_weight(module: nn.Module) -> NormWeight:
    """What transformers' RMSNorm modules of the known families compute with."""
    return NormWeight(module.weight, module.variance_epsilon)


def is_plain_linear(module: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a module is ``x @ weight.T`` and nothing else, in that dtype and on that device."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight.data) is torch.Tensor and weight.dtype == dtype and weight.device == device


def _family(model: PreTrainedModel) -> str:
    kind = type(model)
    for prefix, package in FAMILIES.items():
        home = f"transformers.models.{package}.modeling_{package}"
        if (kind.__name__, kind.__module__) == (f"{prefix}ForCausalLM", home):
            return prefix
    known = ", ".join(f"{prefix}ForCausalLM" for prefix in FAMILIES)
    raise Unfusable(f"the model is a {kind.__module__}.{kind.__name__}; the fused route knows transformers' {known}")


def _check_layer(layer: nn.Module, name: str, prefix: str, classes: dict[str, type]) -> None:
    _expect(layer, classes[f"{prefix}DecoderLayer"], name)
    _expect(layer.self_attn, classes[f"{prefix}Attention"], f"{name}.self_attn")
    _expect(layer.mlp, classes[f"{prefix}MLP"], f"{name}.mlp")
    for part in ("input_layernorm", "post_attention_layernorm"):
        _expect(getattr(layer, part), classes[f"{prefix}RMSNorm"], f"{name}.{part}")
    for part in PROJECTIONS:
        _expect(getattr(layer.self_attn, part), nn.Linear, f"{name}.self_attn.{part}")
    for part in MLP_PROJECTIONS:
        _expect(getattr(layer.mlp, part), nn.Linear, f"{name}.mlp.{part}")
    if prefix == "Qwen3":
        for part in ("q_norm", "k_norm"):
            _expect(getattr(layer.self_attn, part), classes["Qwen3RMSNorm"], f"{name}.self_attn.{part}")
    together = (PROJECTIONS[:3], layer.self_attn), (MLP_PROJECTIONS[:2], layer.mlp)
    for names, parent in together:
        if len({getattr(parent, part).bias is None for part in names}) > 1:
            raise Unfusable(f"in {name}, some of {', '.join(names)} have a bias and some have none")


def _expect(module: nn.Module, kind: type, name: str) -> None:
    if type(module) is not kind:
        found = f"{type(module).__module__}.{type(module).__name__}"
        raise Unfusable(f"{name} is a {found}; expected {kind.__module__}.{kind.__name__} itself")


def _check_untouched(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if "forward" in vars(module):
            raise Unfusable(f"{where} has a forward of its own in place of its class's")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # transformers leaves its own on a model once hidden states were asked for; they only record
            if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                raise Unfusable(f"{where} has a forward hook, which the fused route would pass by")


def _check_tensors(target: Target) -> None:
    model = target.model
    dtype = model.model.embed_tokens.weight.dtype
    if dtype not in WEIGHT_DTYPES or getattr(model, "hf_quantizer", None) is not None:
        raise Unfusable("the model's weights are quantised")
    for name, tensor in model.named_parameters():
        if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
            raise Unfusable(f"{name} is a {type(tensor.data).__name__}, no plain tensor")
        if tensor.dtype != dtype:
            raise Unfusable(f"{name} is {tensor.dtype} and the embedding {dtype}; the fused route needs one dtype")
        if tensor.device != target.device:
            raise Unfusable(f"{name} is on {tensor.device} and the embedding on {target.device}; one device is needed")
    if target.device.type == "meta":
        raise Unfusable("the model's weights are on the meta device")
    shapes = {(shape.k_size, shape.v_size, shape.dtype) for shape in target.layer_shapes}
    size = model.model.layers[0].self_attn.head_dim
    if shapes != {(size, size, dtype)}:
        raise Unfusable(f"layers store keys and values as {sorted(map(str, shapes))}; expected [{size}] of {dtype}")
