"""The training loop: optimiser, schedule, log, evaluation, checkpoints and resuming."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagle.errors import TrainingError
from eagle.train import distributed
from eagle.train.corpus import Batch, Cursor, Packer
from eagle.train.options import TrainOptions
from eagle.train.progress import Bar
from eagle.train.step import TrainStep
from eagle.train.target import Target

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    elapsed: float = 0.0
    """Seconds of training so far."""
    tokens: int = 0
    batch_tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)


def learning_rate(fraction: float, peak: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` of the run, then a cosine to 1 % of the peak."""
    if fraction < warmup:
        return peak * max(0.01, fraction / warmup)
    share = (fraction - warmup) / max(1e-9, 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def chain_length(accuracy: list[float]) -> float:
    """Expected tokens a step of drafting one chain, from the accuracy of each position: 1 + Σ Π accuracy."""
    length, alive = 1.0, 1.0
    for value in accuracy:
        alive *= value
        length += alive
    return length


class Trainer:
    """Trains ``step.head``; :meth:`run` until done or paused.

    Args:
        options: of the run.
        target: the frozen model.
        step: the forward of one step.
        packer: training batches.
        held_out: batches to measure on.
        folder: for checkpoint and log.
        deadline: ``time.monotonic()`` at which to pause, or None.
    """

    def __init__(
        self,
        options: TrainOptions,
        target: Target,
        step: TrainStep,
        packer: Packer,
        held_out: list[Batch],
        folder: Path,
        deadline: float | None = None,
    ) -> None:
        self.options, self.target, self.step, self.packer = options, target, step, packer
        self.held_out, self.folder, self.deadline = held_out, folder, deadline
        self.progress = Progress(batch_tokens=options.batch_tokens)
        self.model: nn.Module = distributed.wrap(step)
        self.optimiser = self._new_optimiser()
        self.saved_at = self.evaluated_at = time.monotonic()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        parameters = list(self.step.head.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.options.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        fused = self.target.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=self.options.lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)

    @property
    def fraction(self) -> float:
        """How much of the run is done."""
        if self.options.total_steps is not None:
            return self.progress.step / self.options.total_steps
        return distributed.agree(self.progress.elapsed / (60 * self.options.minutes))

    # One step

    def forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of one batch; returns the summed losses [steps] and hits [steps]."""
        features, hidden = self.target.features(batch.tokens, batch.positions, batch.packing)
        total, losses, hits = self.model(batch, features, hidden)
        total.backward()
        return losses, hits

    def update(self, fraction: float) -> float:
        """Apply the gradients; returns the learning rate."""
        rate = learning_rate(fraction, self.options.lr, self.options.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.step.head.parameters(), self.options.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return rate

    def _step(self, fraction: float) -> tuple[Tensor, Tensor, list[int], float]:
        """Draw a batch and learn from it; a batch that does not fit is halved."""
        while True:
            batch, cursor = self.packer.draw(self.progress.cursor, self.progress.batch_tokens)
            try:
                losses, hits = self.forward_backward(batch)
                rate = self.update(fraction)
            except torch.OutOfMemoryError as error:
                self._halve(str(error).splitlines()[0])
                continue
            self.progress.cursor = cursor
            self.progress.tokens += self.progress.batch_tokens * distributed.world()
            self.progress.step += 1
            return losses, hits, batch.labels.counts, rate

    def _halve(self, message: str) -> None:
        before, after = self.progress.batch_tokens, self.progress.batch_tokens // 2
        self.optimiser.zero_grad(set_to_none=True)
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()
        if distributed.world() > 1:
            raise TrainingError(
                f"a batch of {before} tokens a GPU does not fit in memory ({message}): use --batch-tokens {after}"
            )
        longest = int(self.packer.corpus.lengths.max())
        if after < longest:
            raise TrainingError(
                f"one conversation of {longest} tokens does not fit in memory with batches of {before} tokens "
                f"({message}): use a smaller --max-length, --draft-vocab or --intermediate-size"
            )
        print(f"out of memory with {before} tokens a step: going on with {after}", flush=True)
        self.progress.batch_tokens = after

    # The run

    def run(self) -> bool:
        """Train to the end; returns False where the run was paused.

        Raises:
            TrainingError: the loss is not finite, or memory does not suffice for one conversation.
        """
        options, progress = self.options, self.progress
        self.step.train()
        self.saved_at = self.evaluated_at = mark = time.monotonic()
        tokens_at, time_at = progress.tokens, progress.elapsed
        loss_sum = hit_sum = None
        counts = [0] * options.ttt_steps
        with Bar("training", quiet=not distributed.first()) as bar:
            while (fraction := self.fraction) < 1:
                losses, hits, count, rate = self._step(fraction)
                loss_sum = losses if loss_sum is None else loss_sum + losses
                hit_sum = hits if hit_sum is None else hit_sum + hits
                counts = [a + b for a, b in zip(counts, count, strict=True)]
                last = self.fraction >= 1
                now = time.monotonic()
                progress.elapsed += now - mark
                mark = now
                if progress.step % options.log_every and not last:
                    continue
                entry = self._entry(loss_sum, hit_sum, counts, rate)
                now = time.monotonic()
                progress.elapsed += now - mark
                mark = now
                spent = max(1e-9, progress.elapsed - time_at)
                entry["tokens_per_second"] = round((progress.tokens - tokens_at) / spent)
                tokens_at, time_at = progress.tokens, progress.elapsed
                self._write_log(entry)
                bar.update(self.fraction, _status(entry), force=last)
                loss_sum = hit_sum = None
                counts = [0] * options.ttt_steps
                if self._due("evaluated_at", 60 * options.evaluate_minutes):
                    self._write_log(self.evaluate())
                if self._due("saved_at", options.checkpoint_seconds):
                    self.save()
                if self.deadline is not None and distributed.agree(float(time.monotonic() > self.deadline)):
                    self.save()
                    return False
                progress.elapsed += time.monotonic() - mark
                mark = time.monotonic()
        self.save()
        return True

    def _due(self, name: str, seconds: float) -> bool:
        due = bool(distributed.agree(float(time.monotonic() - getattr(self, name) >= seconds)))
        if due:
            setattr(self, name, time.monotonic())
        return due

    def _entry(self, losses: Tensor, hits: Tensor, counts: list[int], rate: float) -> dict[str, Any]:
        means, accuracy = _means(losses, hits, counts)
        if not all(math.isfinite(value) for value in means):
            kept = self.folder / CHECKPOINT
            where = f"the last good checkpoint is {kept}" if kept.is_file() else "no checkpoint had been written yet"
            raise TrainingError(
                f"the loss is not finite at step {self.progress.step} (learning rate {rate:.3g}); {where}: "
                "train again with a lower --lr or --clip"
            )
        return {
            "step": self.progress.step,
            "fraction": round(self.fraction, 5),
            "seconds": round(self.progress.elapsed, 1),
            "tokens": self.progress.tokens,
            "epoch": self.progress.cursor.epoch,
            "lr": rate,
            "loss": means,
            "accuracy": accuracy,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss and accuracy by position on the held-out conversations."""
        self.step.eval()
        losses = hits = None
        counts = [0] * self.options.ttt_steps
        for batch in self.held_out:
            features, hidden = self.target.features(batch.tokens, batch.positions, batch.packing)
            _, loss, hit = self.step(batch, features, hidden)
            losses = loss if losses is None else losses + loss
            hits = hit if hits is None else hits + hit
            counts = [a + b for a, b in zip(counts, batch.labels.counts, strict=True)]
        self.step.train()
        means, accuracy = _means(losses, hits, counts)
        result = {
            "step": self.progress.step,
            "held_out_loss": means,
            "held_out_accuracy": accuracy,
            "held_out_chain_length": round(chain_length(accuracy), 3),
        }
        if distributed.first():
            print(
                f"held out at step {self.progress.step}: accuracy {_short(accuracy)}, "
                f"chain of {len(accuracy)} gives {result['held_out_chain_length']} tokens a step",
                flush=True,
            )
        return result

    def _write_log(self, entry: dict[str, Any]) -> None:
        if distributed.first():
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")

    # Checkpoints

    def save(self) -> None:
        """Write the checkpoint, atomically; in a run over several GPUs the first rank writes."""
        cursors = distributed.gather(asdict(self.progress.cursor))
        if not distributed.first():
            return
        state = {
            "settings": self.options.settings(),
            "world": distributed.world(),
            "head": self.step.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {**asdict(self.progress), "cursor": None},
            "cursors": cursors,
        }
        temporary = self.folder / f".{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / CHECKPOINT)

    def resume(self) -> bool:
        """Go on from the checkpoint; returns False where there is none.

        Raises:
            TrainingError: it was written with other settings (both are named), or cannot be read.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return False
        state = load_checkpoint(path)
        compare_settings(state["settings"], self.options.settings(), path)
        if state["world"] != distributed.world():
            raise TrainingError(
                f"{path} was written by {state['world']} processes, but {distributed.world()} are running: use as many"
            )
        self.step.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        cursor = Cursor(**state["cursors"][distributed.rank()])
        self.progress = Progress(**{**state["progress"], "cursor": cursor})
        if distributed.first() and (self.folder / LOG).is_file():
            lines = (self.folder / LOG).read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= self.progress.step]
            (self.folder / LOG).write_text("".join(line + "\n" for line in kept))
        return True


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise TrainingError(f"the checkpoint {path} cannot be read ({error}): train again with --overwrite") from error


def compare_settings(there: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    """Raise a TrainingError that names the first setting in which a resumed run differs."""
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise TrainingError(
                f"{path} was written with {key} = {there.get(key)}, but this run has {key} = {here.get(key)}: "
                "resume with the same settings, or start anew with --overwrite"
            )


def _means(losses: Tensor, hits: Tensor, counts: list[int]) -> tuple[list[float], list[float]]:
    """Mean loss and accuracy by position; the device is read here."""
    both = torch.stack([losses, hits]).tolist()
    loss, accuracy = ([round(v / max(1, n), 5) for v, n in zip(row, counts, strict=True)] for row in both)
    return loss, accuracy


def _short(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _status(entry: dict[str, Any]) -> str:
    return (
        f"step {entry['step']} · loss {entry['loss'][0]:.3f} · accuracy {_short(entry['accuracy'])} · "
        f"{entry['tokens_per_second']:,} tokens/s"
    )
