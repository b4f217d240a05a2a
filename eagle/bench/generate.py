"""A set of prompts, by EAGLE and plainly: latencies, tokens/s, acceptance, and whether the outputs are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle.bench.runs import RunFigures, check_prompts, measure, parting

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel


@dataclass(frozen=True)
class GenerateReport:
    """The same prompts, run both ways."""

    eagle: RunFigures
    plain: RunFigures

    @property
    def speedup(self) -> float:
        """EAGLE's tokens/s over plain decoding's, prefill included."""
        return self.eagle.tokens_per_second / self.plain.tokens_per_second

    def partings(self) -> dict[int, int]:
        """For each prompt whose outputs differ, counted from 1: the first new token that does, counted from 1."""
        pairs = enumerate(zip(self.eagle.outputs, self.plain.outputs, strict=True), start=1)
        found = {number: parting(one, other) for number, (one, other) in pairs}
        return {number: where + 1 for number, where in found.items() if where is not None}

    @property
    def identical(self) -> int:
        """How many prompts have the same output both ways."""
        return len(self.eagle.outputs) - len(self.partings())

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "identical": self.identical,
            "first_difference": {str(number): where for number, where in self.partings().items()},
            "speedup": self.speedup,
            "eagle": self.eagle.to_json(),
            "plain": self.plain.to_json(),
        }


def measure_prompts(
    model: EaModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    repeats: int = 1,
    warmup: int = 1,
    batch: int = 1,
    told: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> GenerateReport:
    """Run the prompts greedily both ways. told: (what runs now, runs done, runs in all). Raises what `measure` raises."""
    check_prompts(model, prompts)

    def run(name: str, speculative: bool) -> RunFigures:
        return measure(
            model,
            prompts,
            max_new_tokens,
            speculative=speculative,
            repeats=repeats,
            warmup=warmup,
            batch=batch,
            told=lambda done, total: told(name, done if speculative else total + done, 2 * total),
        )

    return GenerateReport(run("EAGLE", True), run("plain", False))


def rows(report: GenerateReport) -> Iterator[tuple[str, str, str]]:
    """The figures for people: what, with EAGLE, plainly."""
    both = (report.eagle, report.plain)

    def row(what: str, value: Callable[[RunFigures], float], digits: int = 1) -> tuple[str, str, str]:
        first, second = (f"{value(figures):.{digits}f}" for figures in both)
        return what, first, second

    yield row("time to first token, ms, median", lambda figures: 1e3 * figures.first_token_seconds)
    yield row("time per token, ms, median", lambda figures: 1e3 * figures.token_seconds_median, 2)
    yield row("time per token, ms, 99th percentile", lambda figures: 1e3 * figures.token_seconds_p99, 2)
    yield row("time per step, ms, median", lambda figures: figures.step_ms, 2)
    yield row("tokens/s", lambda figures: figures.tokens_per_second)
    yield row("tokens/s after the first token", lambda figures: figures.decode_tokens_per_second)
    yield row("accept length", lambda figures: figures.accept_length, 2)
    if report.eagle.peak_memory_bytes is not None:
        yield row("peak memory, GB", lambda figures: (figures.peak_memory_bytes or 0) / 1e9, 2)
    yield "speed-up", f"{report.speedup:.2f}x", "1.00x"


def closing_lines(report: GenerateReport) -> Iterator[str]:
    """Acceptance by position and the equality of outputs."""
    yield "steps of a row that committed at least"
    for position, share in enumerate(report.eagle.acceptance_by_position, start=1):
        yield f"  {position:>2} {'token ' if position == 1 else 'tokens'}  {100 * share:5.1f} %"
    yield ""
    yield f"outputs identical to plain decoding: {report.identical} of {len(report.eagle.outputs)}"
    for number, where in report.partings().items():
        yield f"  prompt {number} parts at new token {where}"
