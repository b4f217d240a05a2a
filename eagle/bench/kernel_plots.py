"""Plots of a kernel report: time against the floor for each op, and attention's bandwidth against the prefix."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eagle.bench.kernel_ops.trial import TORCH
from eagle.bench.kernels import KernelReport, Row

STYLES = {"attention_tree": "-", "attention_chain": "--", "attention_decode": ":"}


def plot(report: KernelReport, folder: Path) -> list[Path]:
    """Draw what the report has timings for. → the files."""
    timed = [row for row in report.rows if row.us]
    drawn = [_floors(timed, folder / "kernels_floor.png")]
    attention = [row for row in timed if row.op in STYLES]
    if attention and report.ceilings is not None:
        drawn.append(_bandwidth(attention, report.ceilings.read_gb_s, folder / "attention_bandwidth.png"))
    return drawn


def _floors(rows: list[Row], path: Path) -> Path:
    """One line a case of the report's first dtype, at most 60: kernel, PyTorch and floor."""
    rows = [row for row in rows if row.dtype == rows[0].dtype][:60]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.22 * len(rows)), layout="constrained")
    at = range(len(rows))
    axes.scatter([row.floor_us for row in rows], at, marker="|", s=90, color="black", label="floor")
    axes.scatter([row.us for row in rows], at, s=22, label="Triton")
    torch_at = [
        (row.rivals[TORCH], place) for place, row in enumerate(rows) if isinstance(row.rivals.get(TORCH), float)
    ]
    if torch_at:
        axes.scatter(*zip(*torch_at, strict=True), s=22, marker="x", label="PyTorch")
    axes.set_yticks(at, [f"{row.op}, {row.label}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel(f"µs a call, {rows[0].dtype}")
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _bandwidth(rows: list[Row], read_gb_s: float, path: Path) -> Path:
    """A colour a model, a style an op; the first dtype."""
    rows = [row for row in rows if row.dtype == rows[0].dtype]
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.model, row.op), []).append(row)
    for (model, op), members in sorted(lines.items(), key=lambda line: models.index(line[0][0])):
        members.sort(key=lambda row: row.prefix)
        axes.plot(
            [row.prefix for row in members],
            [row.gb_s for row in members],
            color=f"C{models.index(model)}",
            linestyle=STYLES[op],
            marker="o",
            label=f"{op.removeprefix('attention_')}, {model}",
        )
    axes.axhline(read_gb_s, color="black", linewidth=1, label="measured read bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"prefix, tokens ({rows[0].dtype})")
    axes.set_ylabel("GB/s")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, handlelength=4, loc="outside right center")
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
