"""The seams to transformers: our attention function and our cache layers. Checked against transformers 5.17, 5.23 and 5.24.

An attention function registered without a mask function gets no mask, so the tree mask is ours. Cache layers derive from
`CacheLayerMixin` and write at device-side lengths. What both need to know of the forward under way lies in a context
variable, so that no model has to pass it on. The model's own attention setting is put back after every forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from eagle.errors import InvalidInputError
from eagle.model.kv_cache import LayerShape
from eagle.model.ops import Ops

ATTENTION_NAME = "eagle_tree"


@dataclass
class ForwardContext:
    """What the attention function and the cache layers need to know about the forward under way."""

    ops: Ops
    kv_len: torch.Tensor  # [B]
    tree_words: torch.Tensor | None  # [B, T, W]
    slots: int  # host-side bound: no row needs a cache slot at or beyond it
    calls: list[dict[str, Any]] | None = None  # filled by the probe
    moved: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """kv_len and tree_words on a layer's device (a model may be spread over several)."""
        if device not in self.moved:
            words = None if self.tree_words is None else self.tree_words.to(device)
            self.moved[device] = (self.kv_len.to(device), words)
        return self.moved[device]


_context: ContextVar[ForwardContext] = ContextVar("eagle_forward")


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def _active() -> ForwardContext:
    context = _context.get(None)
    if context is None:
        raise InvalidInputError(
            "the target was called directly while EAGLE was running it in another thread; call one at a time"
        )
    return context


@contextmanager
def serving(model: nn.Module, config: PreTrainedConfig, context: ForwardContext) -> Iterator[None]:
    """Have ``model``, which reads ``config``, attend through our function, and put its own setting back afterwards.

    Forwards of one model take turns.
    """
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        previous = config._attn_implementation
        token = _context.set(context)
        config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            config._attn_implementation = previous
            _context.reset(token)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature. query: [B, Hq, T, D]; key, value: the whole cache [B, Hkv, S, D]."""
    context = _active()
    kv_len, words = context.on(query.device)
    if context.calls is not None:
        context.calls.append({**kwargs, "attention_mask": attention_mask})
    out = context.ops.attention(
        query.transpose(1, 2),
        key,
        value,
        kv_len,
        words,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    return out, None


AttentionInterface.register(ATTENTION_NAME, _attention_forward)


class TreeCacheLayer(CacheLayerMixin):
    """One layer of a `KVCache` as transformers wants to see it."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Memory is allocated before the first forward."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context = _active()
        kv_len, _ = context.on(key_states.device)
        context.ops.kv_append(self.keys, key_states, kv_len)
        context.ops.kv_append(self.values, value_states, kv_len)
        return self.keys[:, :, : context.slots], self.values[:, :, : context.slots]

    def get_seq_length(self) -> int:
        return 0  # only asked for where positions are not given; they always are

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class ProbeLayer(TreeCacheLayer):
    """Records the shapes a layer stores; holds nothing."""

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        self.shape: LayerShape | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_size, v_size = key_states.shape[-1], value_states.shape[-1]
        self.shape = LayerShape(key_states.shape[1], k_size, v_size, key_states.dtype, key_states.device)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1
