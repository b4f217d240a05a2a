"""How near a step comes to the floor that memory sets: the bytes it must read at the bandwidth measured here.

Each model is measured as loaded and as optimised (on a GPU: Triton kernels, a step as one CUDA graph), by EAGLE and
plainly. Where optimising changes nothing, as on a CPU, there are only the figures as loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eagle.bench.compare import EAGLE, LOADED, OPTIMISED, PLAIN
from eagle.bench.generate import GenerateReport, measure_prompts
from eagle.bench.runs import RunFigures
from eagle.bench.step_bytes import StepBytes, step_bytes
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel


@dataclass(frozen=True)
class RooflineRow:
    """One way of decoding against its floor."""

    decoding: str
    ops: str
    engine: str
    """How its steps ran: "captured" or "eager"."""
    figures: RunFigures
    read: StepBytes
    """At the middle of an average generation."""
    read_gb_s: float
    identical: int | None
    """Prompts whose EAGLE output equals the plain one of the same ops."""

    @property
    def floor_ms(self) -> float:
        """Milliseconds in which the step's bytes can be read."""
        return self.read.total / self.read_gb_s * 1e-6

    @property
    def share(self) -> float:
        """Part of the floor reached: 1 where a step takes no longer than its reads; 0 where there was no step."""
        return self.floor_ms / self.figures.step_ms if self.figures.step_ms else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        figures = self.figures
        return {
            "decoding": self.decoding,
            "ops": self.ops,
            "engine": self.engine,
            "bytes": asdict(self.read) | {"draft_weights": self.read.draft_weights, "total": self.read.total},
            "floor_ms": self.floor_ms,
            "step_ms": figures.step_ms,
            "share": self.share,
            "tokens_per_second": figures.tokens_per_second,
            "accept_length": figures.accept_length,
            "steps": figures.steps,
            "peak_memory_bytes": figures.peak_memory_bytes,
            "identical": self.identical,
            "prompts": figures.prompts,
        }


@dataclass(frozen=True)
class Roofline:
    """A model's rows and the bandwidth they are held against."""

    read_gb_s: float
    rows: tuple[RooflineRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"read_gb_per_second": self.read_gb_s, "rows": [row.to_json() for row in self.rows]}


def measure_roofline(
    model: EaModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    read_gb_s: float,
    *,
    repeats: int = 1,
    options: Mapping[str, Any] | None = None,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Roofline:
    """Measure the ways of ``model``, which comes as loaded and leaves so. read_gb_s: from `eagle.bench.read_speed`.

    options: of `optimize_eagle_with_triton`. told: (what runs, runs done, runs in all). Raises what `measure_prompts` and
    optimising raise.
    """
    rows: list[RooflineRow] = []

    def run(ops: str) -> None:
        report = measure_prompts(
            model,
            prompts,
            max_new_tokens,
            repeats=repeats,
            told=lambda name, done, total: told(f"{name}, {ops}", done, total),
        )
        rows.extend(_rows(model, prompts, ops, report, read_gb_s))

    run(LOADED)
    _, originals = optimize_eagle_with_triton(model, **(options or {}))
    try:
        if originals:
            run(OPTIMISED)
    finally:
        restore_eagle(model, originals)
    return Roofline(read_gb_s, tuple(rows))


def _rows(
    model: EaModel, prompts: list[list[int]], ops: str, report: GenerateReport, read_gb_s: float
) -> list[RooflineRow]:
    engine = next(choice.implementation for choice in model.kernel_report() if choice.op == "step")
    found = []
    for decoding, figures in ((EAGLE, report.eagle), (PLAIN, report.plain)):
        written = sum(map(len, figures.outputs))
        middle = round((figures.prompt_tokens + written / 2) / len(prompts))
        read = step_bytes(model, speculative=figures.speculative, positions=middle)
        identical = report.identical if figures.speculative else None
        found.append(RooflineRow(decoding, ops, engine, figures, read, read_gb_s, identical))
    return found
