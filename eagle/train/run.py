"""A training run from options to a head's folder."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from eagle.errors import TrainingError
from eagle.model.checkpoints import DraftState, save_draft
from eagle.train import distributed
from eagle.train.corpus import Corpus, Cursor, Packer
from eagle.train.loop import LOG, Trainer
from eagle.train.model import Eagle3Head
from eagle.train.options import TrainOptions
from eagle.train.profile import profile
from eagle.train.report import model_card, plot_accuracy
from eagle.train.selfchat import SETTINGS
from eagle.train.setup import (
    choose_backends,
    end_tokens,
    head_config,
    load_target,
    prepare_data,
    say,
    training_device,
)
from eagle.train.step import TrainStep, teacher_rows
from eagle.train.vocab import choose_vocabulary, draft_first, offsets

WORK = "training"
_WRITTEN = ("config.json", "model.safetensors", "README.md", "accuracy.png")


@dataclass(frozen=True)
class TrainResult:
    """``finished`` is False where the run was paused; ``accuracy`` is by position on the held-out conversations."""

    folder: Path
    finished: bool
    accuracy: tuple[float, ...] = ()
    chain_length: float = 0.0


def train(options: TrainOptions) -> TrainResult:
    """Train a head.

    Raises:
        TrainingError: the data, the folder or the settings do not allow it, or the run failed.
        InvalidInputError: an option is outside what is allowed.
    """
    began = time.monotonic()
    distributed.start()
    try:
        return _train(options, began)
    finally:
        distributed.stop()


def _prepare_folder(options: TrainOptions) -> Path:
    work = options.out / WORK
    if distributed.first():
        if options.out.exists() and not options.out.is_dir():
            raise TrainingError(f"{options.out} is a file, but the head needs a folder: give another --out")
        if options.out.is_dir() and _holds_work(options.out):
            if not (options.overwrite or options.resume):
                raise TrainingError(
                    f"{options.out} exists and is not empty: give --resume to go on with its training, --overwrite to "
                    "start anew, or another --out"
                )
            if options.overwrite:
                shutil.rmtree(work, ignore_errors=True)
                for name in _WRITTEN:
                    (options.out / name).unlink(missing_ok=True)
        for folder, option in ((work, "--out"), (options.data_folder, "--data-folder")):
            try:
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(
                    f"cannot make the folder {folder} ({error.strerror}): give another {option}"
                ) from error
    distributed.barrier()
    return work


def _holds_work(folder: Path) -> bool:
    """Whether a folder has files other than the settings that a start leaves before it has any data."""
    return any(path.is_file() and path.name != SETTINGS for path in folder.rglob("*"))


def _train(options: TrainOptions, began: float) -> TrainResult:
    deadline = None if options.pause_after is None else began + options.pause_after
    if options.data is not None and not options.data.is_file():
        raise TrainingError(f"no data file {options.data}: give --data a .jsonl file of conversations")
    training_device(options.device)
    work = _prepare_folder(options)
    target, tokenizer = load_target(options)
    config = head_config(options, target)
    target.backend, decode_backend = choose_backends(options, target, config)
    data = options.data_folder or work / "data"
    if not prepare_data(options, target, tokenizer, data, decode_backend, deadline):
        say("paused while writing conversations: go on with --resume")
        return TrainResult(options.out, finished=False)
    if options.generate_only:
        return TrainResult(options.out, finished=False)

    corpus = Corpus.load(data, options.max_length)
    if int(corpus.tokens.max()) >= config.vocab_size:
        raise TrainingError(f"{data} holds token {int(corpus.tokens.max())}, but the target has {config.vocab_size}")
    training, held_out = corpus.split(options.held_out, options.seed)
    ids, coverage = choose_vocabulary(
        training, config.vocab_size, config.draft_vocab_size, end_tokens(target, tokenizer)
    )
    say(
        f"data: {len(corpus):,} conversations, {int(corpus.lengths.sum()):,} tokens, {int(corpus.mask.sum()):,} of the "
        f"assistant; {corpus.greedy.mean():.0%} greedy; draft vocabulary of {len(ids):,} covers {coverage:.2%}"
    )

    trainer = _trainer(options, target, config, training, held_out, ids, work, deadline)
    resumed = options.resume and trainer.resume()
    if resumed:
        say(f"going on from step {trainer.progress.step} after {trainer.progress.elapsed:.0f} s of training")
    _settle_compile(options, trainer)
    if options.profile:
        parts = profile(trainer, options.profile)
        say(f"a step of {trainer.progress.batch_tokens:,} tokens, part by part: " + _milliseconds(parts))
    if not trainer.run():
        say(f"paused at step {trainer.progress.step}, {trainer.fraction:.1%} done: go on with --resume")
        return TrainResult(options.out, finished=False)

    measured = trainer.evaluate()
    result = TrainResult(options.out, True, tuple(measured["held_out_accuracy"]), measured["held_out_chain_length"])
    if distributed.first():
        trainer._write_log(measured)
        facts = {
            "model": options.name or options.model,
            "parameters": sum(p.numel() for p in trainer.step.head.parameters()),
            "intermediate": config.intermediate_size,
            "conversations": len(corpus),
            "tokens": int(corpus.lengths.sum()),
            "data": f"conversations in {options.data.name}"
            if options.data
            else "self-distillation: written by the "
            f"target from own openings, {options.greedy_share:.0%} of the answers greedy, seed {options.seed}",
            "coverage": coverage,
            "draft_vocab": len(ids),
            "steps": trainer.progress.step,
            "trained_tokens": trainer.progress.tokens,
            "seconds": trainer.progress.elapsed,
            "device": _device_name(target.device),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "accuracy": result.accuracy,
            "chain_length": result.chain_length,
            "held_out": len(held_out),
        }
        _export(options, trainer, ids, facts)
        if not plot_accuracy(work / LOG, options.out / "accuracy.png"):
            say("no plot: matplotlib is not installed (pip install 'eagle-triton-kernels[train]')")
        say(f"head written to {options.out}")
    distributed.barrier()
    return result


def _trainer(
    options: TrainOptions,
    target: Any,
    config: Any,
    training: Corpus,
    held_out: Corpus,
    ids: torch.Tensor,
    work: Path,
    deadline: float | None,
) -> Trainer:
    device = target.device
    chunk = 2048 if device.type == "cuda" else 256
    shared = {"seed": options.seed, "steps": options.ttt_steps, "chunk": chunk, "device": device}
    packer = Packer(training, rank=distributed.rank(), world=distributed.world(), **shared)
    rows = teacher_rows(target, draft_first(ids, config.vocab_size))
    head = Eagle3Head(config, share_lm_head=options.share_lm_head)
    sample, _ = Packer(training, **shared).draw(Cursor(), options.batch_tokens)
    features, hidden = target.features(sample.tokens, sample.positions, sample.packing)
    head.initialise(
        features.cpu(),
        sample.positions.cpu(),
        hidden.cpu(),
        target.decoder.norm.weight.cpu(),
        rows[: len(ids)].cpu(),
        options.seed,
    )
    step = TrainStep(head.to(device), target, rows, options.ttt_steps, target.backend)
    measured = list(Packer(held_out, **shared).in_order(options.batch_tokens))
    return Trainer(options, target, step, packer, measured, work, deadline)


def _settle_compile(options: TrainOptions, trainer: Trainer) -> None:
    """Compile the elementwise parts if that is wanted and works, and run one step without learning from it."""
    cuda = trainer.target.device.type == "cuda"
    if options.compile == "off" or (options.compile == "auto" and not cuda):
        return
    trainer.step.compile_parts(True)
    trainer.step.train()
    batch, _ = trainer.packer.draw(trainer.progress.cursor, trainer.progress.batch_tokens)
    began = time.monotonic()
    try:
        trainer.forward_backward(batch)
        if cuda:
            torch.cuda.synchronize()
        say(f"compiled in {time.monotonic() - began:.0f} s")
    except torch.OutOfMemoryError:
        say("the warm-up step ran out of memory; training will halve its batch")
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if options.compile == "on":
            raise TrainingError(f"torch.compile does not work here ({problem}): use --compile off") from error
        say(f"not compiled, as torch.compile does not work here ({problem}); the eager parts serve")
        trainer.step.compile_parts(False)
    trainer.optimiser.zero_grad(set_to_none=True)


def _export(options: TrainOptions, trainer: Trainer, ids: torch.Tensor, facts: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if trainer.target.device.type == "cuda" else torch.float32
    head = trainer.step.head
    tensors = head.canonical_tensors(dtype)
    if options.share_lm_head and not options.omit_lm_head:
        tensors["lm_head.weight"] = trainer.step.projection.detach().to("cpu", dtype).contiguous()
    if len(ids) < head.config.vocab_size:
        tensors["d2t"] = offsets(ids)
    save_draft(DraftState(head.config, tensors), options.out)
    (options.out / "README.md").write_text(model_card(options, facts))


def _device_name(device: torch.device) -> str:
    count = distributed.world()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{count} × {name}" if count > 1 else name


def _milliseconds(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in parts.items())
