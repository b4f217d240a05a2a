"""The target: any Hugging Face causal LM, driven through transformers' own extension points.

Nothing of the model is forked or replaced: an attention function and cache layers of ours (`eagle.model.hf_seams`) serve
for the length of a forward, and hooks tap the residual stream, so the model's own ``generate`` keeps working as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from eagle.errors import UnsupportedModelError
from eagle.model.draft_config import TargetSpec
from eagle.model.hf_seams import ForwardContext, ProbeLayer, TreeCacheLayer, serving
from eagle.model.kv_cache import KVCache, LayerShape
from eagle.model.ops import Ops
from eagle.model.row_local import RowLocal
from eagle.model.target_support import (
    cache_argument,
    check_attention_call,
    check_config,
    context_length,
    decoder_layers,
)

if TYPE_CHECKING:
    from eagle.model.fused_target import FusedTarget


class Target:
    """A causal LM with our cache, our attention and feature taps.

    aux_layers: residual streams to tap (`DraftConfig.aux_layers`); empty taps the last hidden state after the final
    norm. Raises UnsupportedModelError where a part of the model cannot be driven so, naming the part.
    """

    def __init__(self, model: PreTrainedModel, ops: Ops, aux_layers: tuple[int, ...] = ()) -> None:
        self.model, self.ops, self.aux_layers = model, ops, aux_layers
        self.config = model.config.get_text_config(decoder=True)
        check_config(model, self.config)
        self._cache_argument = cache_argument(model)
        self.device = model.get_input_embeddings().weight.device
        self.layers = decoder_layers(model, self.config.num_hidden_layers)
        self.context_length = context_length(self.config)
        self.layer_shapes, vocab_size = self._probe()
        self.fused: FusedTarget | None = None
        """The fused route, where `eagle.model.fused_target.fuse_target` has turned it on."""
        self.spec = TargetSpec(self.config.hidden_size, vocab_size, len(self.layers))

    @property
    def feature_dtype(self) -> torch.dtype:
        """The activations' dtype, which is the tapped features'."""
        return self.layer_shapes[0].dtype

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """Cache memory for ``batch`` sequences of at most ``slots`` positions, tree included."""
        cache = KVCache(self.layer_shapes, batch, slots)
        cache.view = Cache(layers=[TreeCacheLayer(k, v) for k, v in cache.layers])
        return cache

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's input embeddings of ``tokens`` [...], as [..., hidden]."""
        return self.model.get_input_embeddings()(tokens.to(self.device))

    def unfuse(self) -> None:
        """Go back to the general route, and give the model's parameters memory of their own. Twice does no harm."""
        fused, self.fused = self.fused, None
        if fused is not None:
            fused.release()

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
        ops: Ops | None = None,
        row_local: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run new rows over the cache: logits [B, T or kept, V] and features [B, T, F].

        tokens: [B, T]; kv_len: [B]; depths: [B, T] node depths with ``tree_words`` [B, T, W], or None for a causal
        chunk; slots: a bound the caller knows on the cache slots in use; logits_to_keep as in transformers; ops: the
        table for this pass, or None for the model's; row_local: have the modules keep each row's bits (`RowLocal`, which
        raises NotRowLocal where they can't), as the fused route does wherever its ops do.
        """
        if self.fused is not None:
            rows = {"depths": depths, "tree_words": tree_words, "slots": slots}
            return self.fused.forward(tokens, cache, kv_len, **rows, logits_to_keep=logits_to_keep, ops=ops)
        offsets = torch.arange(tokens.shape[1], device=tokens.device) if depths is None else depths
        # Nodes beyond the context can never be committed; the clamp keeps learned position tables in range.
        positions = (kv_len[:, None] + offsets).clamp(max=self.context_length - 1)
        ops, watching = ops or self.ops, nullcontext()
        if row_local:
            watching = RowLocal(ops.linear, self.model)
            ops = ops.replaced(attention=watching.apart(ops.attention), kv_append=watching.apart(ops.kv_append))
        context = ForwardContext(ops, kv_len, tree_words, cache.slots if slots is None else slots)
        taps: dict[int, torch.Tensor] = {}
        with serving(self.model, self.config, context), self._tapping(taps), watching:
            logits = self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **{self._cache_argument: cache.view},
            ).logits
        keys = self.aux_layers or (-1,)
        features = torch.cat([taps[key].to(self.device) for key in keys], dim=-1)
        return logits.to(self.device), features

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
        layers = [ProbeLayer() for _ in self.layers]
        context = ForwardContext(self.ops, zero, None, 1, calls=[])
        try:
            with serving(self.model, self.config, context):
                cache = {self._cache_argument: Cache(layers=layers)}
                logits = self.model(input_ids=token, position_ids=token, use_cache=True, **cache).logits
        except (TypeError, AttributeError, LookupError, NotImplementedError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run with a custom attention and cache ({error}); use a model "
                "whose transformers class supports both"
            ) from error
        check_attention_call(self.model, self.config, context.calls or [])
        self.windows: list[int | None] = [call.get("sliding_window") for call in context.calls or []]
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
