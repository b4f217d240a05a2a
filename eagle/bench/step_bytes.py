"""The bytes a decoding step must read: what sets the floor of its time on a device bound by memory.

Counted: every weight the step multiplies by, once for each pass that needs it, and the cached keys and values each pass
attends to. Left out as small: embedding rows looked up, activations, what is written. In a target with experts all of
them are counted, although few rows may call only some. Weights of a small head may come from the device's cache when
a step reads them again. Where products run on one-byte copies of their weights, the copies and their scales are what is
read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eagle.model.fused_draft import FusedDraft

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel
    from eagle.model.fused_weights import Product
    from eagle.model.target import Target


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one step reads."""

    target_weights: int
    """Decoder layers, final norm and output head."""
    draft_weights_once: int
    """What the head runs once a step: EAGLE-3's fusing of the target's features."""
    draft_weights_pass: int
    """What each pass of the head reads: its layers and its output head."""
    draft_passes: int
    """The pass over the committed tokens and ``depth`` more; 0 in plain decoding."""
    target_kv: int
    draft_kv: int
    """Over all passes."""

    @property
    def draft_weights(self) -> int:
        return self.draft_weights_once + self.draft_passes * self.draft_weights_pass

    @property
    def total(self) -> int:
        return self.target_weights + self.draft_weights + self.target_kv + self.draft_kv


def step_bytes(model: EaModel, *, speculative: bool = True, positions: int = 0, batch: int = 1) -> StepBytes:
    """What a step of ``model`` with its present tree reads when each of ``batch`` rows has ``positions`` cached."""
    target = model.target
    target_weights = _target_weights(target)
    target_kv = positions * batch * sum(layer.bytes for layer in target.layer_shapes)
    if not speculative:
        return StepBytes(target_weights, 0, 0, 0, target_kv, 0)
    once, every = _draft_weights(model, target.model.get_output_embeddings())
    passes = model.tree_shape.depth + 1
    draft_kv = passes * positions * batch * sum(layer.bytes for layer in model.ea_layer.layer_shapes)
    return StepBytes(target_weights, once, every, passes, target_kv, draft_kv)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors, those that share memory once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _target_weights(target: Target) -> int:
    decoder = target.model.get_decoder() if hasattr(target.model, "get_decoder") else target.model
    looked_up = target.model.get_input_embeddings().weight
    used = [tensor for tensor in decoder.parameters() if tensor is not looked_up]
    if target.fused is None or target.fused.dtype is None:
        return tensor_bytes([*used, *target.model.get_output_embeddings().parameters()])
    return _copied_bytes(target.fused.products, [decoder], looked_up)


def _copied_bytes(
    products: Iterable[Product], modules: Iterable[torch.nn.Module], looked_up: torch.Tensor | None = None
) -> int:
    """Bytes of the products and of what in ``modules`` is neither a product nor ``looked_up``: their norms."""
    parts = [part for product in products for part in (product.weight, product.bias, product.scale) if part is not None]
    inner = [module for outer in modules for module in outer.modules()]
    norms = [
        parameter
        for module in inner
        if not isinstance(module, torch.nn.Linear)
        for parameter in module.parameters(recurse=False)
        if parameter is not looked_up
    ]
    return tensor_bytes([*parts, *norms])


def _draft_weights(model: EaModel, output: torch.nn.Module) -> tuple[int, int]:
    """Bytes the head reads once a step and in each pass."""
    draft = model.ea_layer
    fusing = [module for module in (draft.fc, draft.fc_norm, draft.input_norm) if module is not None]
    running = [module for module in (draft.layers, draft.norm, draft.lm_head) if module is not None]
    served = model._session.draft
    if isinstance(served, FusedDraft) and served.one_byte:
        once, each = served.products
        fused, every = _copied_bytes(once, fusing), _copied_bytes(each, running)
        if len(each) == 4 * len(draft.layers):  # the output head stays the target's module
            every += tensor_bytes(output.parameters())
        return (fused, every) if draft.config.kind == "eagle3" else (0, every + fused)
    fused = tensor_bytes(parameter for module in fusing for parameter in module.parameters())
    every = tensor_bytes(parameter for module in running for parameter in module.parameters())
    if draft.lm_head is None and draft.d2t is None:
        every += tensor_bytes(output.parameters())
    elif draft.lm_head is None:  # a copy of the target's rows
        every += len(draft.d2t) * output.weight.shape[1] * output.weight.element_size()
    # EAGLE-1 and -2 join embedding and feature in every pass.
    return (fused, every) if draft.config.kind == "eagle3" else (0, every + fused)
