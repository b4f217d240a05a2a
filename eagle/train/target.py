"""The target during training: packed forwards with feature taps, and prefill and decoding into an own cache.

The model is any Hugging Face causal LM whose attention goes through transformers' ``AttentionInterface``. The
attention function registered here reads what to do from a :class:`Plan` that the caller installs; masks and caches of
transformers are not used, so nothing is read on the host and a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from eagle.errors import UnsupportedModelError
from eagle.model.checkpoint_formats import default_aux_layers
from eagle.train.attention import Packing, packed_causal_attention

ATTENTION_NAME = "eagle_train"


@dataclass
class DecodeCache:
    """Keys and values of a fixed number of rows: per layer [rows, slots, kv_heads, head_dim]."""

    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class Plan:
    """What the attention function does during one forward."""

    kind: str
    """ "packed", "prefill" or "decode"."""
    backend: str
    packing: Packing | None = None
    cache: DecodeCache | None = None
    rows: Tensor | None = None
    """Cache rows of a packed prefill's documents, int64 [docs]; of a decode step: all, 0, 1, ..."""
    slots: Tensor | None = None
    """Prefill: for each packed token its cache row and slot, int64 [2, N]. Decode: the slot written, int64 [rows]."""
    lengths: Tensor | None = None
    """Decode: keys each row sees, int32 [rows]."""
    offsets_q: Tensor | None = None
    offsets_k: Tensor | None = None
    bias: Tensor | None = None
    """Decode without flash attention: additive mask [rows, 1, 1, slots]."""


_plan: list[Plan] = []


@contextmanager
def installed(plan: Plan) -> Iterator[None]:
    """Let the attention function follow ``plan`` inside the block."""
    _plan.append(plan)
    try:
        yield
    finally:
        _plan.pop()


def _decode(plan: Plan, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows, heads, _, dim = query.shape
    keys, values = plan.cache.keys[layer], plan.cache.values[layer]
    kv_heads, slots = keys.shape[2], keys.shape[1]
    keys.index_put_((plan.rows, plan.slots), key[:, :, 0])
    values.index_put_((plan.rows, plan.slots), value[:, :, 0])
    group = heads // kv_heads
    if plan.backend == "flash":
        # The query heads of a kv head become query rows: the cache is read once for all of them.
        q = query.view(rows, kv_heads, group, dim).transpose(1, 2).reshape(rows * group, kv_heads, dim)
        out = torch.ops.aten._flash_attention_forward(
            q,
            keys.view(rows * slots, kv_heads, dim),
            values.view(rows * slots, kv_heads, dim),
            plan.offsets_q,
            plan.offsets_k,
            group,
            slots,
            0.0,
            False,
            False,
            scale=scale,
            seqused_k=plan.lengths,
        )[0]
        return out.view(rows, group, kv_heads, dim).transpose(1, 2).reshape(rows, 1, heads, dim)
    out = nn.functional.scaled_dot_product_attention(
        query.view(rows, kv_heads, group, dim),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=plan.bias.expand(rows, kv_heads, group, slots),
        scale=scale,
    )
    return out.reshape(rows, 1, heads, dim)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query`` [B, H, T, D], ``key`` and ``value`` [B, Hkv, T, D] → [B, T, H, D]; transformers' contract."""
    plan = _plan[-1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if plan.kind == "decode":
        return _decode(plan, module.layer_idx, query, key, value, scale), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if plan.kind == "prefill":
        plan.cache.keys[module.layer_idx].index_put_((plan.slots[0], plan.slots[1]), k)
        plan.cache.values[module.layer_idx].index_put_((plan.slots[0], plan.slots[1]), v)
    return packed_causal_attention(q, k, v, plan.packing, scale, plan.backend)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)


@dataclass
class Target:
    """A frozen causal LM, prepared for training a head.

    ``aux_layers`` are the residual streams that feed the head: i means the input of layer i, and the number of layers
    means the last layer's output before the final norm.
    """

    model: nn.Module
    backend: str = "dense"
    aux_layers: tuple[int, ...] = ()
    _taps: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        decoder = getattr(self.model, "model", None)
        if not hasattr(decoder, "layers") or not hasattr(decoder, "norm") or self.model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no model.layers, model.norm and lm_head: "
                "heads are trained for decoder-only language models laid out like Llama"
            )
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(self.model.config, name, None) not in (None, 1, 1.0):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} scales its logits ({name}): heads are trained on plain logits only"
                )
        self.decoder = decoder
        self.config = self.model.config
        self.model.requires_grad_(False).eval()
        self.model.set_attn_implementation(ATTENTION_NAME)
        layers = len(decoder.layers)
        if not self.aux_layers:
            self.aux_layers = default_aux_layers(layers)
        for index in set(self.aux_layers):
            module = decoder.norm if index == layers else decoder.layers[index]
            module.register_forward_pre_hook(self._tap(index), with_kwargs=True)

    def _tap(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._taps[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    @property
    def embeddings(self) -> Tensor:
        """[vocab, hidden]."""
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> Tensor:
        """The output projection's rows, [vocab, hidden]."""
        return self.model.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Final hidden states after the last norm, [B, T, hidden], for ``tokens`` and ``positions`` [B, T] int64."""
        with installed(plan):
            return self.decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state

    @torch.no_grad()
    def features(self, tokens: Tensor, positions: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Run packed documents.

        Args:
            tokens: int64 [N], documents one after another.
            positions: int64 [N], counted from each document's beginning.
            packing: where documents begin.

        Returns:
            The features [N, len(aux_layers) * hidden] and the final hidden states after the norm [N, hidden].
        """
        hidden = self.hidden(tokens[None], positions[None], Plan("packed", self.backend, packing=packing))[0]
        features = torch.cat([self._taps[index][0] for index in self.aux_layers], dim=-1)
        self._taps.clear()
        return features, hidden

    def cache_bytes(self, rows: int, slots: int) -> int:
        """Memory that `new_cache` takes."""
        return 2 * len(self.decoder.layers) * math.prod(self._cache_shape(rows, slots)) * self.dtype.itemsize

    def _cache_shape(self, rows: int, slots: int) -> tuple[int, int, int, int]:
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return rows, slots, config.num_key_value_heads, head_dim

    def new_cache(self, rows: int, slots: int) -> DecodeCache:
        """An empty cache for ``rows`` sequences of at most ``slots`` tokens."""
        shape = self._cache_shape(rows, slots)
        layers = len(self.decoder.layers)

        def make() -> list[Tensor]:
            return [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(layers)]

        return DecodeCache(make(), make())


def check_decode(heads: int, kv_heads: int, dim: int, device: torch.device) -> str | None:
    """Compare flash decoding with plain attention on a small input; None where they agree, else what went wrong."""
    generator = torch.Generator().manual_seed(1)
    rows, slots = 5, 80

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    lengths = torch.tensor([1, 17, 40, 79, 64], device=device, dtype=torch.int32)
    keys, values = make(rows, slots, kv_heads, dim), make(rows, slots, kv_heads, dim)
    query, key, value = make(rows, heads, 1, dim), make(rows, kv_heads, 1, dim), make(rows, kv_heads, 1, dim)
    count = torch.arange(rows + 1, device=device, dtype=torch.int32)
    hidden = torch.arange(slots, device=device) >= lengths[:, None]
    bias = torch.zeros(rows, slots, device=device, dtype=torch.bfloat16).masked_fill(hidden, float("-inf"))
    results = []
    for backend in ("dense", "flash"):
        plan = Plan(
            "decode", backend, cache=DecodeCache([keys.clone()], [values.clone()]), rows=count[:-1].long(),
            slots=lengths.long() - 1, lengths=lengths, offsets_q=count * (heads // kv_heads),
            offsets_k=count * slots, bias=bias[:, None, None],
        )  # fmt: skip
        try:
            results.append(_decode(plan, 0, query, key, value, dim**-0.5).float())
        except (RuntimeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    worst = float((results[0] - results[1]).norm() / results[0].norm())
    return None if worst < 0.03 else f"relative difference {worst:.3g} from plain attention"
