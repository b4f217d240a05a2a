"""The parts of a report that a loaded model answers, each as JSON values."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle.bench.accept import measure_acceptance
from eagle.bench.generate import measure_prompts
from eagle.bench.prefixes import Encode
from eagle.bench.prompts import Prompt
from eagle.bench.provenance import clocks
from eagle.bench.roofline import measure_roofline
from eagle.bench.runs import check_prompts
from eagle.bench.sweep import Grid, measure_sweep
from eagle.errors import EagleError
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

if TYPE_CHECKING:
    import torch

    from eagle.model.ea_model import EaModel

FAILURES = (EagleError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, OSError)
"""What a part may raise where a library, a launch or the machine fails."""

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    prompts: list[Prompt]
    max_new_tokens: int
    grid: Grid
    roofline_prompts: int
    """As many of the prompts, spread over them: those as loaded take long."""
    roofline_tokens: int
    accept_batch: int = 1
    weights: Mapping[str, str | None] = field(default_factory=dict)
    """``draft_dtype`` and ``target_dtype`` of the optimised model."""


class ModelParts:
    """A loaded model and the plan. Each method leaves the model as it was loaded."""

    def __init__(self, model: EaModel, plan: Plan, encode: Encode, read_gb_s: Callable[[], float], told: Told) -> None:
        self.model, self.plan, self.encode, self.read_gb_s, self.told = model, plan, encode, read_gb_s, told

    def run(self, part: str) -> dict[str, Any]:
        """One part's result, with the clocks seen at its end. Raises what measuring raises."""
        shape = self.model.tree_shape
        common = {
            "dtype": str(self.model.base_model.dtype).removeprefix("torch."),
            "tree": [shape.total_token, shape.depth, shape.top_k],
            "context": self.model.target.context_length,
            **{kind: dtype or "same" for kind, dtype in self.plan.weights.items()},
        }
        return common | getattr(self, part)() | {"clocks": clocks(self.model.device)}

    def generate(self) -> dict[str, Any]:
        plan = self.plan
        ids = [self.encode(prompt.text) for prompt in plan.prompts]
        check_prompts(self.model, ids, [prompt.place for prompt in plan.prompts])
        with _optimised(self.model, self.plan.weights):
            served = served_line(self.model)
            report = measure_prompts(self.model, ids, plan.max_new_tokens, told=self.told)
        return {"max_new_tokens": plan.max_new_tokens, "served": served} | report.to_json()

    def roofline(self) -> dict[str, Any]:
        plan = self.plan
        chosen = plan.prompts[:: max(1, len(plan.prompts) // plan.roofline_prompts)][: plan.roofline_prompts]
        ids = [self.encode(prompt.text) for prompt in chosen]
        found = measure_roofline(
            self.model, ids, plan.roofline_tokens, self.read_gb_s(), options=plan.weights, told=self.told
        )
        return found.to_json()

    def sweep(self) -> dict[str, Any]:
        plan = self.plan
        with _optimised(self.model, self.plan.weights):
            cells = measure_sweep(
                self.model, self.encode, [prompt.text for prompt in plan.prompts], plan.grid, told=self.told
            )
        return {"new_tokens": plan.grid.new_tokens, "cells": [cell.to_json() for cell in cells]}

    def accept(self) -> dict[str, Any]:
        plan, done = self.plan, 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.told("acceptance", done, len(plan.prompts))

        with _optimised(self.model, self.plan.weights):
            report = measure_acceptance(
                self.model,
                plan.prompts,
                self.encode,
                max_new_tokens=plan.max_new_tokens,
                batch=plan.accept_batch,
                advance=advance,
            )
        return {"max_new_tokens": plan.max_new_tokens, "batch": plan.accept_batch} | report.as_dict()


@contextmanager
def _optimised(model: EaModel, weights: Mapping[str, str | None]) -> Iterator[None]:
    """Triton kernels and captured steps, where there are any; the model as before afterwards."""
    _, originals = optimize_eagle_with_triton(model, **weights)
    try:
        yield
    finally:
        restore_eagle(model, originals)


def part_failures() -> tuple[type[Exception], ...]:
    """`FAILURES`, and Triton's own where it is installed."""
    if importlib.util.find_spec("triton") is None:
        return FAILURES
    from triton.errors import TritonError

    return (*FAILURES, TritonError)


def served_line(model: EaModel) -> str:
    """What serves the steps now, in one line."""
    choices = model.kernel_report()
    kernels = [choice for choice in choices if choice.implementation == "triton"]
    steps = ", ".join(f"{choice.op} {choice.implementation}" for choice in choices if choice.op in ("step", "target"))
    ops = f"Triton kernels serve {len({choice.op for choice in kernels})} ops" if kernels else "PyTorch serves all ops"
    return f"{ops}; {steps}"


def kernels_part(device: torch.device, seconds: float | None, told: Callable[[str, int, int], None]) -> dict[str, Any]:
    """The quick cases of the kernels: correctness, and on a GPU times. A red row carries none. seconds: no case begins
    after so many."""
    from eagle.bench.kernel_cases import select_cases
    from eagle.bench.kernels import run_cases
    from eagle.bench.report_files import METHOD, summary

    on_gpu = device.type == "cuda"
    cases = select_cases((), (), (), quick=True, interpreted=not on_gpu)
    report = run_cases(
        cases, device, seconds=seconds, told=lambda index, row: told(f"kernel {row.op}", index + 1, len(cases))
    )
    ceilings = None if report.ceilings is None else vars(report.ceilings)
    rows = [finite(row.as_dict()) for row in report.rows]
    return {"summary": summary(report), "method": METHOD, "ceilings": ceilings, "rows": rows, "clocks": clocks(device)}


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: such numbers become texts."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
