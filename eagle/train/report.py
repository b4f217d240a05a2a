"""What a finished run leaves for people: a plot of accuracy by position, and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle.train.options import TrainOptions


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training entries and the held-out entries of a log."""
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [e for e in entries if "accuracy" in e], [e for e in entries if "held_out_accuracy" in e]


def plot_accuracy(log: Path, image: Path) -> bool:
    """Draw accuracy by position over the steps; returns False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    training, held_out = read_log(log)
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    for position in range(len(training[0]["accuracy"]) if training else 0):
        colour = f"C{position % 10}"
        axes.plot(
            [e["step"] for e in training], [e["accuracy"][position] for e in training], color=colour, linewidth=0.8,
            alpha=0.5, label=f"position {position + 1}",
        )  # fmt: skip
        axes.plot(
            [e["step"] for e in held_out], [e["held_out_accuracy"][position] for e in held_out], color=colour,
            marker="o", markersize=4, linestyle="--",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title="Accuracy by draft position (dots: held out)")
    axes.grid(alpha=0.3)
    if training:
        axes.legend(fontsize=8, ncols=2)
    FigureCanvasAgg(figure).print_png(image)
    return True


def model_card(options: TrainOptions, facts: dict[str, Any]) -> str:
    """The README of a head's folder.

    ``facts``: ``model``, ``parameters``, ``conversations``, ``tokens``, ``data``, ``coverage``, ``draft_vocab``,
    ``steps``, ``trained_tokens``, ``seconds``, ``device``, ``versions``, ``accuracy``, ``chain_length``, ``held_out``.
    """
    accuracy = " | ".join(f"{value:.3f}" for value in facts["accuracy"])
    positions = " | ".join(str(i + 1) for i in range(len(facts["accuracy"])))
    stored = "not stored: the target's rows of the draft vocabulary serve" if options.omit_lm_head else "stored"
    return f"""---
library_name: eagle-triton-kernels
tags: [eagle3, speculative-decoding]
---
# EAGLE-3 head for {facts["model"]}

A draft head for speculative decoding with EAGLE-3: it guesses the target's next tokens, and the target checks them, so
it changes the speed of the output and not the output.

| | |
|---|---|
| target | {facts["model"]} |
| parameters trained | {facts["parameters"]:,} |
| MLP width | {facts["intermediate"]:,} |
| draft vocabulary | {facts["draft_vocab"]:,} tokens, {facts["coverage"]:.2%} of the assistant's tokens in the data |
| lm_head | {"the target's, frozen" if options.share_lm_head else "trained"}; {stored} |
| data | {facts["data"]} |
| conversations | {facts["conversations"]:,}, {facts["tokens"]:,} tokens |
| training | {facts["steps"]:,} steps, {facts["trained_tokens"]:,} tokens, {facts["seconds"]:.0f} s on {facts["device"]} |
| software | {facts["versions"]} |

Accuracy by position on {facts["held_out"]} held-out conversations (the head's best token equal to the target's, earlier
draft tokens right):

| {positions} |
|{"---|" * len(facts["accuracy"])}
| {accuracy} |

Drafting one chain of {len(facts["accuracy"])} tokens, that gives {facts["chain_length"]:.2f} tokens for each forward of
the target; a draft tree gives more.

Command:

```
{options.command or "(started from Python)"}
```
"""
