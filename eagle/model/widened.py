"""EAGLE-3B and EAGLE-8B: the default pair widened (:mod:`eagle.model.widening`) to the shapes of larger Llamas.

They write SmolLM2-135M's text, guessed by its head, at the cost of a model of their size: benchmarks that need no download
of that size. Built once into the user's cache as two plain Hugging Face folders, or straight into memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.model.embedded import MANIFEST

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from eagle.model.checkpoints import DraftState
    from eagle.model.widening import Part, Shape, Widening

Advance = Callable[[int], None]
"""Told the bytes done since the last call."""

SIZES: dict[str, dict[str, Any]] = {
    # Layers of Llama-3.2-3B, as many as the small model has; its output head is not tied to the embedding, whose padding
    # must be zero, so that a matrix of zeros would be multiplied.
    "EAGLE-3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_heads": 24,
        "num_kv_heads": 8,
        "head_dim": 128,
        "num_layers": 30,
        "vocab_size": 128_256,
        "draft_intermediate_size": 8192,
        "draft_vocab_size": 32_000,
        "aux_layers": (2, 15, 27),
    },
    # Llama-3.1-8B and the head SafeAILab publishes for it.
    "EAGLE-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "num_layers": 32,
        "vocab_size": 128_256,
        "draft_intermediate_size": 14_336,
        "draft_vocab_size": 32_000,
        "aux_layers": (2, 16, 29),
    },
}


def shape_of(name: str) -> Shape:
    """The sizes of the preset ``name``."""
    from eagle.model.widening import Shape

    return Shape(**SIZES[name])


@dataclass(frozen=True)
class SmallPair:
    """The folders of the pair that is widened."""

    target: Path
    head: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The target's config.json."""
        from eagle.model.checkpoint_files import read_config

        return read_config(self.target)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The target's weights, mapped from the file."""
        from eagle.model.checkpoint_files import read_tensors

        return read_tensors(self.target)

    @cached_property
    def draft(self) -> DraftState:
        from eagle.model.checkpoints import load_draft
        from eagle.model.draft_config import TargetSpec

        sizes = (self.config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
        return load_draft(self.head, TargetSpec(*sizes), target_rms_eps=self.config["rms_norm_eps"])

    @property
    def shape(self) -> Shape:
        from eagle.model.widening import Shape

        config, head = self.config, self.draft.config
        return Shape(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            draft_intermediate_size=head.intermediate_size,
            draft_vocab_size=head.draft_vocab_size,
            aux_layers=head.aux_layers,
        )

    def widening(self, big: Shape, device: torch.device | str, dtype: torch.dtype) -> Widening:
        from eagle.model.widening import Widening

        eps = min(self.config["rms_norm_eps"], self.draft.config.rms_norm_eps)
        return Widening(self.shape, big, eps, device=device, dtype=dtype)

    def target_parts(self, widening: Widening) -> list[Part]:
        return list(widening.target(self.tensors))

    def draft_parts(self, widening: Widening) -> list[Part]:
        output = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return list(widening.draft(self.draft.config, self.draft.tensors, output))

    def digest(self) -> str:
        """What a build depends on: the target's manifest and the head's files."""
        digest = hashlib.sha256()
        files = [self.target / MANIFEST, self.head / "config.json", self.head / "model.safetensors"]
        for path in files:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def wide_config(self, widening: Widening) -> dict[str, Any]:
        """config.json of the widened target."""
        big = widening.big
        return self.config | {
            "hidden_size": big.hidden_size,
            "intermediate_size": big.intermediate_size,
            "num_attention_heads": big.num_heads,
            "num_key_value_heads": big.num_kv_heads,
            "head_dim": big.head_dim,
            "num_hidden_layers": big.num_layers,
            "vocab_size": big.vocab_size,
            "rms_norm_eps": widening.eps(self.config["rms_norm_eps"]),
            "tie_word_embeddings": False,
            "dtype": str(widening.dtype).removeprefix("torch."),
        }


def build_in_memory(
    name: str,
    small: SmallPair,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, DraftState]:
    """Target and head of the preset ``name`` on ``device``, made there tensor by tensor; nothing touches the disk.

    On a CPU in bfloat16 the tensors are those of `ensure_widened`, bit for bit. A GPU draws other random numbers, which
    no output depends on; other dtypes keep more or fewer digits of the small model's weights.

    Raises:
        OutOfMemoryError: the device has no room; said before anything is made.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from eagle.model.memory import check_fits

    widening = small.widening(shape_of(name), device, dtype)
    parts, head = small.target_parts(widening), small.draft_parts(widening)
    size = sum(part_bytes(part, dtype) for part in (*parts, *head))
    check_fits(size, device, f"the weights of {name}", dtype)
    config = LlamaConfig.from_dict(small.wide_config(widening))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    with progress_bar(progress, name, size, None) as advance:
        state = {}
        for part in parts:
            state[part.name] = part.make()
            advance(part_bytes(part, dtype))
        draft = widened_draft(small, widening, head, advance)
    model.load_state_dict(state, strict=True, assign=True)
    # The only buffers, and no part of a checkpoint: they are still on the meta device.
    model.model.rotary_emb = LlamaRotaryEmbedding(config=model.config).to(device)
    if (small.target / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(small.target)
    model.name_or_path = model.config.name_or_path = name
    return model.eval(), draft


def widened_draft(small: SmallPair, widening: Widening, parts: list[Part], advance: Advance) -> DraftState:
    from eagle.model.checkpoints import DraftState

    tensors = {}
    for part in parts:
        tensors[part.name] = part.make()
        advance(part_bytes(part, widening.dtype))
    return DraftState(widening.draft_config(small.draft.config), tensors)


def part_bytes(part: Part, dtype: torch.dtype) -> int:
    count = 1
    for length in part.shape:
        count *= length
    return count * (8 if part.name == "d2t" else dtype.itemsize)


@contextlib.contextmanager
def progress_bar(enabled: bool, name: str, size: int, folder: Path | None) -> Iterator[Advance]:
    """A line that says what is built, and a bar on a terminal, both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    where = "in memory" if folder is None else f"into {folder}, once"
    if enabled:
        print(f"Building {name} ({size / 1e9:.1f} GB) {where}", file=sys.stderr, flush=True)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bars:
        task = bars.add_task(name, total=size)
        yield lambda done: bars.advance(task, done)
