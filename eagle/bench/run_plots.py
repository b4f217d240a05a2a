"""The bar chart of a comparison: tokens/s and milliseconds a step of each way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # draws files, needs no display

import matplotlib.pyplot as plt

from eagle.errors import EagleError

if TYPE_CHECKING:
    from eagle.bench.compare import Way

COLORS = {"EAGLE": "#2a6fbb", "plain": "#b0b7bf"}


def plot_ways(ways: Sequence[Way], title: str, path: Path) -> None:
    """Write one figure with two panels. Raises EagleError where the file can't be written."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    names = [way.name.replace(", ", "\n") for way in ways]
    colors = [COLORS.get(way.decoding, "#555555") for way in ways]
    series = {
        "tokens/s (median run)": [way.tokens_per_second for way in ways],
        "ms a step (median step)": [way.figures.step_ms for way in ways],
    }
    for panel, (label, values) in zip(panels, series.items(), strict=True):
        bars = panel.bar(names, values, color=colors)
        panel.bar_label(bars, fmt="%.1f", padding=2)
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.12)
    figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise EagleError(f"cannot write the plot {path} ({error.strerror or error})") from error
    finally:
        plt.close(figure)
