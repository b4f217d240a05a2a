"""What a run will need, counted before it is taken."""

from __future__ import annotations

import torch

from eagle.engine.state import padded_rows
from eagle.errors import OutOfMemoryError
from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.ops import TreeShape
from eagle.model.target import Target

GIB = 2**30

RESERVE = 256 << 20
"""Bytes left for kernels' code and libraries' handles, measured by no one exactly."""


def cache_bytes(target: Target, draft: DraftModel | FusedDraft, batch: int, slots: int) -> int:
    """The KV caches of target and draft."""
    return sum(layer.bytes for layer in [*target.layer_shapes, *draft.layer_shapes]) * batch * slots


def pass_bytes(target: Target, batch: int, shape: TreeShape) -> int:
    """The largest tensors of a target pass: logits twice (a sampled step copies them to float32), layers' activations."""
    rows = batch * padded_rows(shape)
    width = target.spec.hidden_size
    size = target.feature_dtype.itemsize
    return rows * (target.spec.vocab_size * (size + 4) + 32 * width * size)


def free_bytes(device: torch.device) -> int | None:
    """What torch could still allocate on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fits(
    target: Target, draft: DraftModel | FusedDraft, batch: int, slots: int, shape: TreeShape, beside: int = 0
) -> bool:
    """Whether caches of ``batch`` rows and ``beside`` more, and a step of the batch, fit on the target's CUDA device.

    A target spread over several devices is not counted: each holds an unknown part.
    """
    free = free_bytes(target.device)
    if free is None or len({layer.device for layer in target.layer_shapes}) > 1:
        return True
    need = cache_bytes(target, draft, batch + beside, slots) + pass_bytes(target, batch, shape)
    return need + RESERVE <= free


def check_room_for_copies(target: Target, dtype: str) -> None:
    """Raise OutOfMemoryError if one-byte copies of the target's weights don't fit beside it. As `fits`."""
    free = free_bytes(target.device)
    if free is None or len({layer.device for layer in target.layer_shapes}) > 1:
        return
    need = sum(parameter.numel() for parameter in target.model.parameters())
    if need + RESERVE > free:
        raise OutOfMemoryError(
            f"target_dtype {dtype} needs {need / GIB:.1f} GiB beside the model's own weights, and {free / GIB:.1f} GiB are "
            "free; leave it out, or load a model that is quantised already"
        )


def too_large(
    target: Target,
    draft: DraftModel | FusedDraft,
    batch: int,
    slots: int,
    shape: TreeShape,
    free: int | None = None,
    beside: int = 0,
    cause: BaseException | None = None,
) -> OutOfMemoryError:
    """The error for a run that does not fit, with what would help most named first.

    beside: rows of cache that prefill needs beside the batch's. cause: the allocator's own error, quoted where the
    figures alone would not explain it.
    """
    caches, rest = cache_bytes(target, draft, batch + beside, slots), pass_bytes(target, batch, shape)
    there = "more than is free" if free is None else f"and {free / GIB:.1f} GiB are free"
    lower = "max_new_tokens, max_length or the batch" if caches >= rest else "the tree's total_token or the batch"
    what = f"{batch} sequences" + (f", and {beside} more for their prefill," if beside else "")
    unexplained = cause is not None and free is not None and caches + rest < free
    said = f" (the allocator: {allocator_line(cause)})" if unexplained else ""
    return OutOfMemoryError(
        f"{what} of {slots} positions need {caches / GIB:.1f} GiB for the KV caches and {rest / GIB:.1f} GiB "
        f"for a step of {shape.total_token} nodes, {there}{said}; lower {lower}"
    )


def allocator_line(error: BaseException) -> str:
    """What an allocator's error begins with: that memory is out, and how much was asked for."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ". ".join(first.split(". ")[:2]).rstrip(".")


def roomy_slots(
    target: Target, draft: DraftModel | FusedDraft, batch: int, slots: int, most: int, shape: TreeShape
) -> int:
    """Slots to allocate where a captured step is bound to its caches: the next power of two, so that few captures occur,
    unless that takes more than an eighth of the device's memory or than is free."""
    free = free_bytes(target.device)
    if free is None:
        return slots
    rounded = max(slots, min(max(1024, 1 << (slots - 1).bit_length()), most))
    need = cache_bytes(target, draft, batch, rounded)
    total = torch.cuda.get_device_properties(target.device).total_memory
    fits = need * 8 <= total and need + pass_bytes(target, batch, shape) + RESERVE <= free
    return rounded if fits else slots


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError on a GPU; a CPU allocator raises the base class."""
    return isinstance(error, torch.OutOfMemoryError) or "tried to allocate" in str(error).lower()
