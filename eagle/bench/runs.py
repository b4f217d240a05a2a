"""Whole generations timed on the host: the one place where a run's figures are measured, for every report.

The clock is read between the steps that `EaModel.stream` hands out. A step's tokens are on the host by then, so nothing
is waited for inside a run; the devices are waited for before and after it. Caches are kept from run to run, as they are
for a user; prompts are processed anew each time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from eagle.engine.prefill_graph import chunk_rows
from eagle.errors import InvalidInputError
from eagle.model.ops import Sampling

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

Told = Callable[[int, int], None]
"""Told (runs done, runs in all), warm-ups included, after each run."""


@dataclass(frozen=True)
class RunFigures:
    """What runs over prompts × repeats took. A run is one call: ``batch`` prompts together, prefill included."""

    outputs: tuple[tuple[int, ...], ...]
    """The new tokens of each prompt, of its first repeat."""
    repeatable: bool
    """Whether every repeat gave these tokens."""
    speculative: bool
    prompts: int
    repeats: int
    batch: int
    prompt_tokens: int
    """Of all prompts, once."""
    new_tokens: int
    """Of all runs, as all that follows."""
    steps: int
    seconds_min: float
    seconds_median: float
    seconds_max: float
    first_token_seconds: float
    """Median over runs: from the call to the first token on the host."""
    token_seconds_median: float
    """Over tokens after the first, each of which takes an even part of its step's time."""
    token_seconds_p99: float
    step_seconds_median: float
    tokens_per_second: float
    """New tokens over whole runs."""
    decode_tokens_per_second: float
    """Tokens after the first over the time after the first."""
    accept_length: float
    """τ: tokens a running row's step committed, on average; 1 where there was no step."""
    acceptance_by_position: tuple[float, ...]
    """Entry i − 1: the share of a running row's steps that committed at least i tokens."""
    peak_memory_bytes: int | None
    """The most memory torch had allocated on the model's GPUs at once, weights and warm-ups included; None on a CPU."""

    @property
    def step_ms(self) -> float:
        return 1e3 * self.step_seconds_median

    def to_json(self) -> dict[str, Any]:
        """Every field but the outputs, as JSON values."""
        values = asdict(self)
        del values["outputs"]
        return values | {"acceptance_by_position": list(self.acceptance_by_position)}


@dataclass
class _Run:
    """One timed call."""

    seconds: float = 0.0
    first_token_seconds: float = 0.0
    rows: list[list[int]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    steps: int = 0


def measure(
    model: EaModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    speculative: bool = True,
    repeats: int = 1,
    warmup: int = 1,
    temperature: float = 0.0,
    seed: int | None = 0,
    batch: int = 1,
    eos_token_id: Iterable[int] | None = None,
    told: Told | None = None,
) -> RunFigures:
    """Run every prompt ``repeats`` times, ``batch`` at a time, and clock it.

    warmup: runs beforehand that don't count, as `warmups` chooses them, each so often, so that later ones find memory and
    whatever is compiled or captured. eos_token_id: end tokens in place of the model's own, () for none.

    Raises InvalidInputError for counts below 1 (warmup: below 0) and what `EaModel.stream` refuses, naming a prompt too
    long for the model's context.
    """
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("batch", batch, 1)):
        if value < least:
            raise InvalidInputError(f"{name} is {value}; expected at least {least}")
    check_prompts(model, prompts)
    groups = [prompts[begin : begin + batch] for begin in range(0, len(prompts), batch)]
    sampling = Sampling(temperature)
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "speculative": speculative}
    options["seed"] = None if sampling.greedy else seed
    options["eos_token_id"] = None if eos_token_id is None else tuple(eos_token_id)
    devices = _devices(model)
    first = warmups(groups, by_chunks=model.captures_steps) * warmup
    total, done = len(first) + len(groups) * repeats, 0

    def run(group: list[list[int]]) -> _Run:
        nonlocal done
        found, done = _run(model, group, options, devices), done + 1
        if told is not None:
            told(done, total)
        return found

    _reset_peak(devices)
    for group in first:
        run(group)
    runs = [[run(group) for _ in range(repeats)] for group in groups]
    path = model.tree_shape.path if speculative else 1
    outputs = tuple(tuple(row) for repeated in runs for row in repeated[0].rows)
    repeatable = all(run.rows == repeated[0].rows for repeated in runs for run in repeated)
    flat = [run for repeated in runs for run in repeated]
    return RunFigures(
        outputs=outputs,
        repeatable=repeatable,
        speculative=speculative,
        prompts=len(prompts),
        repeats=repeats,
        batch=batch,
        prompt_tokens=sum(map(len, prompts)),
        peak_memory_bytes=_peak(devices),
        **_figures(flat, path),
    )


def warmups(groups: list[list[list[int]]], *, by_chunks: bool) -> list[list[list[int]]]:
    """For each batch size among the groups, largest first, the group with the longest prompt; ``by_chunks``: more of
    them, until each size of captured prompt chunk that the groups of that size need has run."""
    found, seen = [], set()
    for group in sorted(groups, key=lambda group: (len(group), max(map(len, group))), reverse=True):
        sizes = {rows for prompt in group for rows in chunk_rows(len(prompt))} if by_chunks else {0}
        if missing := {(len(group), rows) for rows in sizes} - seen:
            seen |= missing
            found.append(group)
    return found


def check_prompts(model: EaModel, prompts: Sequence[list[int]], places: Sequence[str] = ()) -> None:
    """Refuse what can't run, with the number of the prompt and, from ``places``, where it comes from. Raises
    InvalidInputError."""
    if not prompts:
        raise InvalidInputError("there are no prompts to run; give at least one")
    context = model.target.context_length
    for number, prompt in enumerate(prompts, start=1):
        who = f"prompt {number}" + (f" ({places[number - 1]})" if places and places[number - 1] else "")
        if not prompt:
            raise InvalidInputError(f"{who} is empty; expected at least one token")
        if len(prompt) >= context:
            raise InvalidInputError(f"{who} has {len(prompt)} tokens, the model's context is {context}; leave it out")


def parting(one: Iterable[int], other: Iterable[int]) -> int | None:
    """The index of the first token in which two outputs differ (where one ends, its length), or None if equal."""
    one, other = list(one), list(other)
    if one == other:
        return None
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed (nearest rank); 0 for no values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


def _run(model: EaModel, group: list[list[int]], options: dict[str, Any], devices: list[torch.device]) -> _Run:
    run = _Run(rows=[[] for _ in group])
    _synchronize(devices)
    started = last = time.perf_counter()
    with closing(model.stream(group, **options)) as steps:
        stats = model.last_stats
        for index, new in enumerate(steps):
            now = time.perf_counter()
            for row, tokens in zip(run.rows, new, strict=True):
                row += tokens
            if index == 0:
                run.first_token_seconds = now - started
            else:
                run.step_seconds.append(now - last)
                for tokens in new:
                    run.token_seconds += [(now - last) / len(tokens)] * len(tokens) if tokens else []
            last = now
    _synchronize(devices)
    run.seconds = time.perf_counter() - started
    run.accept_lengths, run.steps = list(stats.accept_lengths), stats.steps
    return run


def _figures(runs: list[_Run], path: int) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    new_tokens = sum(len(row) for run in runs for row in run.rows)
    later_tokens = new_tokens - sum(len(run.rows) for run in runs)
    later_seconds = sum(run.seconds - run.first_token_seconds for run in runs)
    steps = [value for run in runs for value in run.step_seconds]
    tokens = [value for run in runs for value in run.token_seconds]
    lengths = [length for run in runs for length in run.accept_lengths]
    return {
        "new_tokens": new_tokens,
        "steps": sum(run.steps for run in runs),
        "seconds_min": min(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        "first_token_seconds": statistics.median(run.first_token_seconds for run in runs),
        "token_seconds_median": statistics.median(tokens) if tokens else 0.0,
        "token_seconds_p99": percentile(tokens, 0.99),
        "step_seconds_median": statistics.median(steps) if steps else 0.0,
        "tokens_per_second": new_tokens / sum(seconds),
        "decode_tokens_per_second": later_tokens / later_seconds if later_tokens else 0.0,
        "accept_length": statistics.fmean(lengths) if lengths else 1.0,
        "acceptance_by_position": tuple(
            sum(length >= position for length in lengths) / max(1, len(lengths)) for position in range(1, path + 1)
        ),
    }


def _devices(model: EaModel) -> list[torch.device]:
    """Every device that the model lies on."""
    layers = [*model.target.layer_shapes, *model.ea_layer.layer_shapes]
    return sorted({model.device, *(layer.device for layer in layers)}, key=str)


def _synchronize(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def _reset_peak(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def _peak(devices: list[torch.device]) -> int | None:
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"]
    return sum(peaks) if peaks else None
