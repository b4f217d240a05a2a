"""A kernel report on disk: JSON with everything, Markdown to read, plots where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from eagle.bench.kernel_ops.trial import TORCH
from eagle.bench.kernels import GREEN, NOT_REACHED, RED, SKIPPED, KernelReport, Row
from eagle.bench.timing import BEYOND_L2, REPEATS

COLUMNS = (
    "op",
    "case",
    "dtype",
    "error",
    "µs",
    "torch µs",
    "eager µs",
    "best rival µs",
    "speed-up",
    "GB/s",
    "TFLOP/s",
    "ceiling",
)
METHOD = (
    f"Times are medians of {REPEATS} CUDA-event timings of a CUDA-graph replay (fewer where a call is very slow), a "
    "replay being many calls, gaps between kernels included. Calls go round over input sets of together "
    f"{BEYOND_L2} times the L2 cache; where small inputs stay in the cache, the row says so (†). torch is the package's "
    "PyTorch op (for a linear, the BLAS library) under graph replay too, eager the same launched "
    "from Python. Bytes: each input read once, each output "
    "written once. The ceiling is the measured read bandwidth or the measured matrix product (in float32 the faster of IEEE "
    "and a third of TF32), whichever binds; the last column is the part of it that is reached."
)


def cells(row: Row) -> list[str]:
    """One row of a table, in the order of COLUMNS."""
    if row.state in (NOT_REACHED, SKIPPED) or (row.state == RED and row.error is None):
        return [row.op, row.label, row.dtype, row.state, *[""] * 8]
    error = ("" if row.state == GREEN else "RED ") + ("exact" if row.error == 0 else f"{row.error:.1e}")
    if row.us is None:
        return [row.op, row.label, row.dtype, error, *[""] * 8]
    others = {name: value for name, value in row.rivals.items() if isinstance(value, float) and name != TORCH}
    best = min(others, key=others.__getitem__) if others else ""
    torch_us = row.rivals.get(TORCH)
    return [
        row.op,
        row.label,
        row.dtype,
        error,
        f"{row.us:.1f}" + ("" if row.beyond_l2 else "†"),
        f"{torch_us:.1f}" if isinstance(torch_us, float) else "failed",
        f"{row.torch_eager_us:.1f}" if row.torch_eager_us else "",
        f"{others[best]:.1f} {best}" if best else "",
        f"{row.speedup:.2f}×" if row.speedup else "",
        f"{row.gb_s:.0f}",
        f"{row.tflop_s:.1f}" if row.tflop_s else "",
        f"{row.share:.0%}" if row.share else "",
    ]


def summary(report: KernelReport) -> list[str]:
    """The last lines on screen."""
    counts = ", ".join(f"{report.count(state)} {state}" for state in (GREEN, RED, SKIPPED, NOT_REACHED))
    lines = [f"{len(report.rows)} cases in {report.seconds:.0f} s: {counts}"]
    if report.ceilings is None:
        lines.append("timings skipped: no CUDA device; correctness ran in Triton's interpreter on shrunken sizes")
    else:
        peaks = ", ".join(f"{name} {value:.0f} TFLOP/s" for name, value in sorted(report.ceilings.tflop_s.items()))
        lines.append(f"measured ceilings: read {report.ceilings.read_gb_s:.0f} GB/s, {peaks}")
    if report.stopped:
        lines.append(f"{report.count(NOT_REACHED)} cases were not reached: {report.stopped}")
    lines += [f"red: {row.op}, {row.label}, {row.dtype}: {row.reason}" for row in report.rows if row.state == RED]
    return lines


def write_report(report: KernelReport, folder: Path, origin: dict[str, Any]) -> list[str]:
    """Write kernels.json, kernels.md and the plots. → what was written, and what was not and why."""
    folder.mkdir(parents=True, exist_ok=True)
    ceilings = None if report.ceilings is None else vars(report.ceilings)
    content = {
        "provenance": origin,
        "method": METHOD,
        "seconds": report.seconds,
        "stopped": report.stopped,
        "ceilings": ceilings,
        "rows": [row.as_dict() for row in report.rows],
    }
    (folder / "kernels.json").write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    (folder / "kernels.md").write_text(_markdown(report, origin), encoding="utf-8")
    notes = [f"wrote {folder / 'kernels.json'} and {folder / 'kernels.md'}"]
    if not any(row.us for row in report.rows):
        return [*notes, "no plots: there are no timings to plot"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*notes, "no plots: matplotlib is not installed (pip install matplotlib)"]
    from eagle.bench.kernel_plots import plot

    return [*notes, *(f"wrote {path}" for path in plot(report, folder))]


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become texts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(report: KernelReport, origin: dict[str, Any]) -> str:
    facts = [f"- {name}: {value}" for name, value in origin.items()]
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    table += ["| " + " | ".join(cells(row)) + " |" for row in report.rows if row.state != NOT_REACHED]
    return "\n".join(["# Kernels", "", *facts, "", *summary(report), "", METHOD, "", *table, ""])
