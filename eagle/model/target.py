"""The target: any Hugging Face causal LM, driven through transformers' own extension points.

Nothing of the model is forked or replaced. Three seams are used, checked against transformers 5.17 and 5.23: an
attention function registered with `AttentionInterface` (which receives no mask, so the tree mask is ours), cache layers
derived from `CacheLayerMixin` that write at device-side lengths, and forward hooks that tap the residual stream. The
model's own attention setting is put back after every forward, so `model.generate` keeps working as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from eagle.errors import UnsupportedModelError
from eagle.model.draft_config import TargetSpec
from eagle.model.kv_cache import KVCache, LayerShape
from eagle.model.ops import Ops
from eagle.model.target_support import check_attention_call, check_config, decoder_layers

ATTENTION_NAME = "eagle_tree"
UNBOUNDED_CONTEXT = 1 << 20


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
    context = _context.get()
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


class _CacheLayer(CacheLayerMixin):
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
        context = _context.get()
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


class _ProbeLayer(_CacheLayer):
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


class Target:
    """A causal LM with our cache, our attention and feature taps.

    aux_layers: residual streams to tap (`DraftConfig.aux_layers`); empty taps the last hidden state after the final
    norm. Raises UnsupportedModelError where a part of the model cannot be driven so, naming the part.
    """

    def __init__(self, model: PreTrainedModel, ops: Ops, aux_layers: tuple[int, ...] = ()) -> None:
        self.model, self.ops, self.aux_layers = model, ops, aux_layers
        self.config = model.config.get_text_config(decoder=True)
        check_config(model, self.config)
        self.device = model.get_input_embeddings().weight.device
        self.layers = decoder_layers(model, self.config.num_hidden_layers)
        self.context_length: int = getattr(self.config, "max_position_embeddings", None) or UNBOUNDED_CONTEXT
        self.layer_shapes, vocab_size = self._probe()
        self.spec = TargetSpec(self.config.hidden_size, vocab_size, len(self.layers))

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """Cache memory for ``batch`` sequences of at most ``slots`` positions, tree included."""
        cache = KVCache(self.layer_shapes, batch, slots)
        cache.view = Cache(layers=[_CacheLayer(k, v) for k, v in cache.layers])
        return cache

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's input embeddings of ``tokens`` [...], as [..., hidden]."""
        return self.model.get_input_embeddings()(tokens.to(self.device))

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        kv_len: torch.Tensor,
        *,
        depths: torch.Tensor | None = None,
        tree_words: torch.Tensor | None = None,
        slots: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run new rows over the cache: logits [B, T or kept, V] and features [B, T, F].

        tokens: [B, T]; kv_len: [B]; depths: [B, T] node depths with ``tree_words`` [B, T, W], or None for a causal
        chunk; slots: a bound the caller knows on the cache slots in use; logits_to_keep as in transformers.
        """
        offsets = torch.arange(tokens.shape[1], device=tokens.device) if depths is None else depths
        # Nodes beyond the context can never be committed; the clamp keeps learned position tables in range.
        positions = (kv_len[:, None] + offsets).clamp(max=self.context_length - 1)
        context = ForwardContext(self.ops, kv_len, tree_words, cache.slots if slots is None else slots)
        taps: dict[int, torch.Tensor] = {}
        with self._serving(context), self._tapping(taps):
            logits = self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=cache.view,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits
        keys = self.aux_layers or (-1,)
        features = torch.cat([taps[key].to(self.device) for key in keys], dim=-1)
        return logits.to(self.device), features

    @contextmanager
    def _serving(self, context: ForwardContext) -> Iterator[None]:
        previous = self.config._attn_implementation
        token = _context.set(context)
        self.config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            self.config._attn_implementation = previous
            _context.reset(token)

    @contextmanager
    def _tapping(self, taps: dict[int, torch.Tensor]) -> Iterator[None]:
        handles = []
        try:
            for layer in self.aux_layers:
                if layer < len(self.layers):
                    hook = _input_tap(taps, layer)
                    handles.append(self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(self.layers[layer - 1].register_forward_hook(_output_tap(taps, layer)))
            if not self.aux_layers:
                handles.append(self.model.base_model.register_forward_hook(_output_tap(taps, -1)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _probe(self) -> tuple[list[LayerShape], int]:
        """Run one token to learn what each layer stores, and refuse what cannot be driven."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        layers = [_ProbeLayer() for _ in self.layers]
        context = ForwardContext(self.ops, zero, None, 1, calls=[])
        try:
            with self._serving(context):
                logits = self.model(
                    input_ids=token, position_ids=token, past_key_values=Cache(layers=layers), use_cache=True
                ).logits
        except (TypeError, AttributeError, LookupError, NotImplementedError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run with a custom attention and cache ({error}); use a model "
                "whose transformers class supports both"
            ) from error
        check_attention_call(self.model, self.config, context.calls or [])
        missing = [index for index, layer in enumerate(layers) if layer.shape is None]
        if missing:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} stored no keys in layers {missing} of {len(layers)}; "
                "every layer must keep its own KV cache: use a decoder whose layers are all attention layers"
            )
        return [layer.shape for layer in layers if layer.shape is not None], logits.shape[-1]


def _input_tap(taps: dict[int, torch.Tensor], key: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps[key] = args[0] if args else kwargs["hidden_states"]

    return hook


def _output_tap(taps: dict[int, torch.Tensor], key: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        taps[key] = output if isinstance(output, torch.Tensor) else output[0]

    return hook
