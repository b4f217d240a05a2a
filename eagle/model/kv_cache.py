"""The KV cache: its memory, and the three ops that touch it (append, retrieve, compact) in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores a position."""

    heads: int
    k_size: int
    v_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Memory of one position."""
        return self.heads * (self.k_size + self.v_size) * self.dtype.itemsize


def kv_append(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> None:
    """Write rows ``new`` [B, H, T, D] into ``cache`` [B, H, S, D] at slots start … start + T - 1, in place.

    start: [B] int64. Slots must lie inside the cache.
    """
    batch, heads, rows, size = new.shape
    slots = start[:, None] + torch.arange(rows, device=start.device)
    cache.scatter_(2, slots[:, None, :, None].expand(batch, heads, rows, size), new.to(cache.dtype))


def kv_retrieve(cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``indices`` [B, N] of ``cache`` [B, H, S, D], as [B, H, N, D]."""
    batch, heads, _, size = cache.shape
    return cache.gather(2, indices[:, None, :, None].expand(batch, heads, indices.shape[1], size))


def kv_compact(
    k: torch.Tensor, v: torch.Tensor, nodes: torch.Tensor, kv_len: torch.Tensor, count: torch.Tensor
) -> None:
    """Move the accepted nodes' rows down to follow the committed prefix, in all layers, in place.

    k: [L, B, H, S, D]; v: [L, B, H, S, Dv]; nodes: [B, P] (row i of the path lies in slot ``kv_len + nodes[i]``);
    kv_len, count: [B]. Afterwards path row i lies in slot ``kv_len + i`` for i < count; other slots hold anything
    finite. Sources are read before anything is written, so overlap is harmless.
    """
    batch, path = nodes.shape
    step = torch.arange(path, device=nodes.device)
    source = kv_len[:, None] + torch.where(step < count[:, None], nodes, step)
    target = kv_len[:, None] + step
    for cache in (k, v):
        layers, _, heads, slots, size = cache.shape
        index = source[None, :, None, :, None].expand(layers, batch, heads, path, size)
        rows = cache.gather(3, index.clamp(max=slots - 1))
        index = target[None, :, None, :, None].expand(layers, batch, heads, path, size)
        cache.scatter_(3, index, rows)


class KVCache:
    """The keys and values of all layers of one model for one batch.

    Layers that agree in heads, head sizes and device share one allocation [L, B, H, S, D], so that compaction takes
    one call for all of them. Memory starts at zero: a masked slot must never hold NaN.
    """

    def __init__(self, layers: list[LayerShape], batch: int, slots: int) -> None:
        self.batch, self.slots = batch, slots
        self.view: Any = None
        """The same memory in the shape a host model wants to see."""
        members: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(layers):
            members.setdefault(shape, []).append(index)
        self.groups: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [None] * len(layers)  # type: ignore[list-item]
        for shape, indices in members.items():
            with torch.inference_mode(False):  # the memory outlives a caller's inference mode, and is written after it
                k, v = (
                    torch.zeros(len(indices), batch, shape.heads, slots, size, dtype=shape.dtype, device=shape.device)
                    for size in (shape.k_size, shape.v_size)
                )
            self.groups.append((k, v))
            for row, index in enumerate(indices):
                self.layers[index] = (k[row], v[row])

    def carry_over(self, old: KVCache, length: int) -> None:
        """Copy the first ``length`` slots of another cache of the same model and batch."""
        for (k, v), (old_k, old_v) in zip(self.groups, old.groups, strict=True):
            k[:, :, :, :length] = old_k[:, :, :, :length]
            v[:, :, :, :length] = old_v[:, :, :, :length]

    def take_row(self, row: int, other: KVCache, length: int) -> None:
        """Copy the first ``length`` slots of another cache's only row into ``row``."""
        for (k, v), (other_k, other_v) in zip(self.groups, other.groups, strict=True):
            k[:, row, :, :length] = other_k[:, 0, :, :length]
            v[:, row, :, :length] = other_v[:, 0, :, :length]
