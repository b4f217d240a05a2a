"""What a training run is asked to do: the command's flags."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eagle.errors import InvalidInputError

_NOT_COMPARED = {
    "out", "overwrite", "resume", "pause_after", "generate_only", "profile", "checkpoint_seconds", "log_every",
    "attention", "compile", "evaluate_minutes", "device", "command", "name", "generate_rows",
}  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """Flags of ``eagle train``; the defaults suit one large GPU."""

    model: str
    """The target: a name or a folder."""
    out: Path
    """The head's folder; ``out/training`` holds data, checkpoints and the log."""
    data: Path | None = None
    """Conversations, ShareGPT or OpenAI format, one JSON object a line. None: the target writes its own."""
    data_folder: Path | None = None
    """Where generated data are kept, to share them between runs. None: in ``out/training/data``."""
    tokens: int = 12_000_000
    """How many tokens the target writes, prompts included."""
    steps: int | None = None
    """Optimiser steps. None with ``minutes`` None: 4,000."""
    minutes: float | None = None
    """Training time instead of steps; the schedule follows the share of it that is used."""
    max_length: int = 512
    """Longest conversation in tokens."""
    batch_tokens: int = 24_576
    """Tokens of one step on one GPU."""
    lr: float = 1e-3
    warmup: float = 0.02
    """Share of the run during which the learning rate rises."""
    clip: float = 0.5
    weight_decay: float = 0.01
    seed: int = 0
    draft_vocab: int = 16_384
    intermediate_size: int | None = None
    """Width of the head's MLP. None: the target's."""
    share_lm_head: bool = False
    """The head scores with the target's own output rows, frozen, instead of training rows of its own."""
    omit_lm_head: bool = False
    """With ``share_lm_head``: do not store those rows."""
    ttt_steps: int = 7
    held_out: int = 200
    """Conversations kept for measuring."""
    greedy_share: float = 0.75
    """Share of generated answers drawn at temperature 0."""
    generate_rows: int | None = None
    """Conversations decoded together. None: 2048 on a GPU, 16 on a CPU."""
    attention: Literal["auto", "flash", "dense"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    device: str = "auto"
    checkpoint_seconds: float = 60.0
    evaluate_minutes: float = 3.0
    log_every: int = 10
    pause_after: float | None = None
    """Stop with a checkpoint this many seconds after the start, to be resumed."""
    generate_only: bool = False
    """Stop when the data are there."""
    profile: int = 0
    """Time this many steps part by part before training."""
    overwrite: bool = False
    resume: bool = False
    name: str = ""
    """What the model card calls the target. Empty: ``model``."""
    command: str = ""
    """The exact command, for the model card."""

    def __post_init__(self) -> None:
        positive = ("tokens", "steps", "minutes", "batch_tokens", "lr", "draft_vocab", "intermediate_size", "ttt_steps",
                    "held_out", "generate_rows", "log_every", "pause_after", "clip")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInputError(f"{name} is {value}, but must be above 0")
        if self.steps is not None and self.minutes is not None:
            raise InvalidInputError("steps and minutes were both given: give one of them")
        if self.overwrite and self.resume:
            raise InvalidInputError("overwrite and resume were both given: give one of them")
        if self.max_length < 64:
            raise InvalidInputError(f"max_length is {self.max_length}, but conversations need at least 64 tokens")
        if self.batch_tokens < self.max_length:
            raise InvalidInputError(
                f"batch_tokens ({self.batch_tokens}) is below max_length ({self.max_length}): one conversation must fit"
            )
        if self.omit_lm_head and not self.share_lm_head:
            raise InvalidInputError("omit_lm_head needs share_lm_head: a trained lm_head has to be stored")
        for name in ("warmup", "greedy_share", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}, but must be from 0 to 1")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InvalidInputError(f"device is {self.device!r}, but must be auto, cpu, cuda or cuda:N")
        for name, allowed in (("attention", ("auto", "flash", "dense")), ("compile", ("auto", "on", "off"))):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")

    @property
    def total_steps(self) -> int | None:
        """The number of steps, or None where the time decides."""
        return self.steps if self.steps or self.minutes else 4000

    def settings(self) -> dict[str, Any]:
        """What decides the result, in JSON's types: a resumed run must have the same."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_COMPARED}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
