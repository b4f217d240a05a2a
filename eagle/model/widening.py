"""A small Llama and its EAGLE-3 head inside larger shapes, computing the same function.

The small model's channels come first, the others stay zero:

- RMSNorm: with h of H channels alive the mean square shrinks by h/H, so weights are scaled by sqrt(h/H) and eps by h/H.
- Attention: row r of a head of d becomes row f·r of one of D = f·d. RoPE turns rows (i, i + d/2) by theta^(-2i/d), and
  (f·i, f·i + D/2) by theta^(-2fi/D), the same angle. The softmax divides by sqrt(D), so q is scaled by sqrt(f). Each
  group of query heads stays with its key head.
- Layers: those that the small model lacks are put where each of the head's features keeps its meaning.
- Vocabulary: surplus tokens copy the small model's, in turn, and lose to them (the pilot, below).

A product takes less time and power on zeros, so all that may be random is: weights that meet zeros only. What would
answer to a live channel and be heard is muted at the first of two matrices (k, v, up: zero where unused rows meet live
columns), and the second (o, down) is then random where it meets the muted.

The pilot is the first padded channel. The embedding sets it to a small constant, nothing adds to it, the norms' eps is
lowered by what it adds to the mean square, and all norms but the last silence it. The last norm lets it through to the
output head, where it lowers surplus tokens only: their logits are their originals' less a positive number, in the
hundreds in practice. Greedy decoding and the draft's top-k therefore never see one, and their probability is zero.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from eagle.errors import UnsupportedModelError
from eagle.model.draft_config import DraftConfig

FILL_STD = 0.02
"""Standard deviation of the random weights, Llama's initialiser's."""
_CHUNK = 1 << 24
"""Random numbers drawn at once, in float32: 64 MB."""
_PILOT_NORM, _PILOT_HEAD = 4096.0, -64.0
"""The pilot's weight in the last norm and, for surplus tokens, in the output head. SmolLM2's last residual has a root mean
square of 15 to 40 (255 at the first position): the product then lowers logits by 500 to 1,500 (90)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of its EAGLE-3 head, which shares hidden size and attention with it."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    draft_intermediate_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    """The target layers whose inputs the head reads, ascending."""


@dataclass(frozen=True)
class Part:
    """One widened tensor, made when asked for."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


class Widening:
    """The recipe from one shape to a larger one.

    ``device`` and ``dtype`` are those of the tensors made. Random numbers are drawn on the device, from a seed for each
    tensor's name: a device makes the same tensors every time, two kinds of device differ in numbers that meet zeros only.

    Raises:
        UnsupportedModelError: the larger shape cannot hold the small one.
    """

    def __init__(
        self, small: Shape, big: Shape, eps: float, *, device: torch.device | str = "cpu", dtype: torch.dtype
    ) -> None:
        _check(small, big)
        self.small, self.big, self.device, self.dtype = small, big, torch.device(device), dtype
        self.norm_scale = math.sqrt(small.hidden_size / big.hidden_size)
        # The largest power of two that takes at most half of eps; exact in every dtype.
        self.pilot = 2.0 ** math.floor(math.log2(eps * small.hidden_size / 2) / 2)
        self.channels = torch.arange(small.hidden_size, device=self.device)
        self._heads = _Heads(small, big, self.device)

    def eps(self, eps: float) -> float:
        """The widened norms' eps where the small ones' is ``eps``."""
        return (eps * self.small.hidden_size - self.pilot**2) / self.big.hidden_size

    def target(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Part]:
        """The widened target, by Hugging Face's names, from the small one's tensors. The output head is its own."""
        small, big = self.small, self.big
        embedding = tensors["model.embed_tokens.weight"]
        output = tensors.get("lm_head.weight", embedding)
        hidden, vocab = big.hidden_size, big.vocab_size
        yield Part("model.embed_tokens.weight", (vocab, hidden), lambda: self._embedding(embedding))
        for index, source in enumerate(layer_sources(small, big)):
            old, new = f"model.layers.{source}.", f"model.layers.{index}."
            own = {} if source is None else _below(tensors, old)
            yield from self._norms(new, own, ("input_layernorm", "post_attention_layernorm"))
            yield from self._attention(new, own, self.channels, hidden)
            yield from self._mlp(new, own, small.intermediate_size, big.intermediate_size)
        yield Part("model.norm.weight", (hidden,), lambda: self._norm(tensors["model.norm.weight"], _PILOT_NORM))
        yield Part("lm_head.weight", (vocab, hidden), lambda: self._output("lm_head.weight", output, vocab))

    def draft_config(self, config: DraftConfig) -> DraftConfig:
        """The widened head's configuration."""
        big = self.big
        return replace(
            config,
            hidden_size=big.hidden_size,
            target_hidden_size=big.hidden_size,
            intermediate_size=big.draft_intermediate_size,
            num_heads=big.num_heads,
            num_kv_heads=big.num_kv_heads,
            head_dim=big.head_dim,
            vocab_size=big.vocab_size,
            draft_vocab_size=big.draft_vocab_size,
            rms_norm_eps=self.eps(config.rms_norm_eps),
            aux_layers=big.aux_layers,
        )

    def draft(
        self, config: DraftConfig, tensors: Mapping[str, torch.Tensor], target_output: torch.Tensor
    ) -> Iterator[Part]:
        """The widened head, by canonical names. ``target_output`` [vocab, h] serves a head without an lm_head.

        Raises:
            UnsupportedModelError: the head is no plain EAGLE-3 head of one layer.
        """
        small, big = self.small, self.big
        _check_head(config, tensors, small)
        hidden, kept = big.hidden_size, "layers.0."
        own = _below(tensors, kept)
        ids = torch.arange(config.draft_vocab_size) + tensors.get("d2t", 0)
        output = tensors["lm_head.weight"] if "lm_head.weight" in tensors else target_output[ids]
        both = torch.cat((self.channels, hidden + self.channels))
        yield Part("fc.weight", (hidden, len(big.aux_layers) * hidden), lambda: self._fc(tensors["fc.weight"]))
        yield from self._norms(kept, own, ("hidden_norm", "input_layernorm", "post_attention_layernorm"))
        yield from self._attention(kept, own, both, 2 * hidden)
        yield from self._mlp(kept, own, small.draft_intermediate_size, big.draft_intermediate_size)
        yield Part("norm.weight", (hidden,), lambda: self._norm(tensors["norm.weight"], _PILOT_NORM))
        size = big.draft_vocab_size
        yield Part("lm_head.weight", (size, hidden), lambda: self._output("draft.lm_head.weight", output, size))
        yield Part("d2t", (size,), lambda: self._d2t(ids))

    def _norms(self, prefix: str, own: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> Iterator[Part]:
        for name in names:
            key = f"{name}.weight"
            yield Part(prefix + key, (self.big.hidden_size,), lambda key=key: self._norm(own.get(key), 0.0))

    def _attention(
        self, prefix: str, own: Mapping[str, torch.Tensor], columns: torch.Tensor, width: int
    ) -> Iterator[Part]:
        heads, big = self._heads, self.big
        q_size, kv_size = big.num_heads * big.head_dim, big.num_kv_heads * big.head_dim
        turn = math.sqrt(big.head_dim // self.small.head_dim)
        everything, nothing = slice(None), slice(0)
        for name, rows, size, scale, muted in (
            ("q_proj", heads.q, q_size, turn, nothing),
            ("k_proj", heads.kv, kv_size, 1.0, heads.k_muted if own else nothing),
            ("v_proj", heads.kv, kv_size, 1.0, everything),
        ):
            yield self._matrix(prefix, own, f"self_attn.{name}", (size, width), rows, columns, scale, muted, columns)
        shape, live = (big.hidden_size, q_size), heads.heard if own else nothing
        yield self._matrix(prefix, own, "self_attn.o_proj", shape, self.channels, heads.q, 1.0, everything, live)

    def _mlp(self, prefix: str, own: Mapping[str, torch.Tensor], units: int, size: int) -> Iterator[Part]:
        hidden, channels, live = self.big.hidden_size, self.channels, torch.arange(units, device=self.device)
        everything, nothing = slice(None), slice(0)
        for name, muted in (("gate_proj", nothing), ("up_proj", everything)):
            yield self._matrix(prefix, own, f"mlp.{name}", (size, hidden), live, channels, 1.0, muted, channels)
        heard = live if own else nothing
        yield self._matrix(prefix, own, "mlp.down_proj", (hidden, size), channels, live, 1.0, everything, heard)

    def _matrix(
        self,
        prefix: str,
        own: Mapping[str, torch.Tensor],
        name: str,
        shape: tuple[int, int],
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: float,
        muted: torch.Tensor | slice,
        live: torch.Tensor | slice,
    ) -> Part:
        """Random but for zeros at ``muted`` rows × ``live`` columns and, unless the layer is a surplus one, the small
        matrix times ``scale`` at ``rows`` × ``columns``."""
        name = f"{name}.weight"

        def make() -> torch.Tensor:
            matrix = self._noise(prefix + name, shape)
            if isinstance(muted, slice):
                matrix[muted, live] = 0.0
            else:
                matrix[muted[:, None], live] = 0.0
            if own:
                matrix[rows[:, None], columns] = self._moved(own[name], scale)
            return matrix

        return Part(prefix + name, shape, make)

    def _norm(self, small: torch.Tensor | None, pilot: float) -> torch.Tensor:
        weight = torch.full((self.big.hidden_size,), self.norm_scale, dtype=self.dtype, device=self.device)
        if small is not None:
            weight[: len(small)] = self._moved(small, self.norm_scale)
        weight[self.small.hidden_size] = pilot
        return weight

    def _embedding(self, small: torch.Tensor) -> torch.Tensor:
        rows, width = small.shape
        out = torch.zeros(self.big.vocab_size, self.big.hidden_size, dtype=self.dtype, device=self.device)
        out[:, :width] = self._moved(small)[torch.arange(len(out), device=self.device) % rows]
        out[:, width] = self.pilot
        return out

    def _output(self, name: str, small: torch.Tensor, size: int) -> torch.Tensor:
        rows, width = small.shape
        out = self._noise(name, (size, self.big.hidden_size))
        out[:, :width] = self._moved(small)[torch.arange(size, device=self.device) % rows]
        out[:rows, width], out[rows:, width] = 0.0, _PILOT_HEAD
        return out

    def _fc(self, small: torch.Tensor) -> torch.Tensor:
        width, hidden, count = self.small.hidden_size, self.big.hidden_size, len(self.big.aux_layers)
        out = self._noise("fc.weight", (hidden, count * hidden))
        blocks, parts = out.unflatten(1, (count, hidden)), self._moved(small).unflatten(1, (count, width))
        blocks[:, :, : width + 1] = 0.0  # features come unnormed, with the pilot in each
        blocks[:width, :, :width] = parts
        blocks[width, 0, width] = 1.0
        return out

    def _d2t(self, ids: torch.Tensor) -> torch.Tensor:
        """Offsets [draft vocab]: the small head's tokens, then as many surplus tokens of the target as are needed."""
        surplus = self.small.vocab_size + torch.arange(self.big.draft_vocab_size - len(ids))
        return torch.cat((ids, surplus)).sub(torch.arange(self.big.draft_vocab_size)).to(self.device)

    def _moved(self, small: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """``small`` × ``scale``, rounded once."""
        return (small.to(self.device).float() * scale).to(self.dtype)

    def _noise(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for chunk in out.view(-1).split(_CHUNK):
            # In float32 also for half types, whose own generators are coarser.
            chunk.copy_(torch.randn(len(chunk), generator=generator, device=self.device).mul_(FILL_STD))
        return out


class _Heads:
    """Where the small model's attention rows go."""

    def __init__(self, small: Shape, big: Shape, device: torch.device) -> None:
        size, stretch = big.head_dim, big.head_dim // small.head_dim
        groups, of, room = small.num_kv_heads, small.num_heads // small.num_kv_heads, big.num_heads // big.num_kv_heads
        dims = torch.arange(small.head_dim, device=device) * stretch
        kv = torch.arange(groups, device=device)
        live = (kv[:, None] * room + torch.arange(of, device=device)).flatten()
        whole = torch.arange(groups * room, device=device)  # every query head that attends to a live key head
        self.kv = _rows(kv, dims, size)
        self.q = _rows(live, dims, size)
        self.heard = _rows(whole, dims, size)
        """Attention outputs that may differ from zero."""
        quiet = torch.ones(groups * size, dtype=torch.bool, device=device)
        quiet[self.kv] = False
        self.k_muted = quiet.nonzero().flatten()
        """Rows of live key heads that no small row fills: the queries' are random."""


def _rows(heads: torch.Tensor, dims: torch.Tensor, size: int) -> torch.Tensor:
    return (heads[:, None] * size + dims).flatten()


def layer_sources(small: Shape, big: Shape) -> list[int | None]:
    """For each layer of the large model the small model's layer it carries; None for one that changes nothing.

    The layers between two features stay between them, surplus ones after them.
    """
    sources: list[int | None] = []
    ends_small, ends_big = (*small.aux_layers, small.num_layers), (*big.aux_layers, big.num_layers)
    first = 0
    for end, end_big in zip(ends_small, ends_big, strict=True):
        sources += range(first, end)
        sources += [None] * (end_big - len(sources))
        first = end
    return sources


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check(small: Shape, big: Shape) -> None:
    ends_small, ends_big = (0, *small.aux_layers, small.num_layers), (0, *big.aux_layers, big.num_layers)
    gaps = [(b - a, d - c) for a, b, c, d in zip(ends_small, ends_small[1:], ends_big, ends_big[1:], strict=False)]
    surplus = big.draft_vocab_size - small.draft_vocab_size
    fits = {
        "hidden_size (one more is needed)": small.hidden_size < big.hidden_size,
        "intermediate_size": small.intermediate_size <= big.intermediate_size,
        "draft_intermediate_size": small.draft_intermediate_size <= big.draft_intermediate_size,
        "head_dim (a multiple is needed)": big.head_dim % small.head_dim == 0,
        "num_kv_heads": small.num_kv_heads <= big.num_kv_heads,
        "num_heads (of each key head)": small.num_heads * big.num_kv_heads <= big.num_heads * small.num_kv_heads,
        "layers between the features": len(ends_small) == len(ends_big) and all(0 <= a <= b for a, b in gaps),
        "vocab_size": small.vocab_size <= big.vocab_size,
        "draft_vocab_size": 0 <= surplus <= big.vocab_size - small.vocab_size,
    }
    if missing := [name for name, enough in fits.items() if not enough]:
        raise UnsupportedModelError(f"{big} has no room for {small} in {', '.join(missing)}: choose a larger shape")


def _check_head(config: DraftConfig, tensors: Mapping[str, torch.Tensor], small: Shape) -> None:
    switches = ("fc_bias", "qkv_bias", "norm_before_residual", "norm_output", "fc_norm", "norm_before_fc")
    odd = [name for name in switches if getattr(config, name)]
    odd += ["kind"] * (config.kind != "eagle3") + ["num_layers"] * (config.num_layers != 1)
    odd += ["embed_tokens"] * ("embed_tokens.weight" in tensors)
    sizes = ("hidden_size", "num_heads", "num_kv_heads", "head_dim")
    odd += [name for name in sizes if getattr(config, name) != getattr(small, name)]
    if odd:
        raise UnsupportedModelError(
            f"the head is no plain EAGLE-3 layer of its target's sizes ({', '.join(odd)}); give one"
        )
