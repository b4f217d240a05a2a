"""A report's models in one row each: what README shows and the report begins with."""

from __future__ import annotations

from typing import Any

from eagle.bench.report import Content

HEAD = (
    "model",
    "plain, tokens/s",
    "EAGLE, tokens/s",
    "speed-up",
    "EAGLE, ms a step",
    "floor, ms",
    "accept length",
    "outputs equal to plain decoding",
)


def generations(content: Content) -> dict[str, dict[str, Any]]:
    """The results of generating, by model; those that failed left out."""
    found = {name: entry["parts"].get("generate") for name, entry in content["models"].items()}
    return {name: result for name, result in found.items() if result is not None and "error" not in result}


def summary_rows(content: Content) -> list[tuple[str, ...]]:
    """A row for each model that generated, in the order of HEAD."""
    return [
        (
            name,
            f"{result['plain']['tokens_per_second']:.0f}",
            f"{result['eagle']['tokens_per_second']:.0f}",
            f"{result['speedup']:.2f}x",
            f"{1e3 * result['eagle']['step_seconds_median']:.2f}",
            _floor(content["models"][name]),
            f"{result['eagle']['accept_length']:.2f}",
            f"{result['identical']} of {result['eagle']['prompts']}",
        )
        for name, result in generations(content).items()
    ]


def _floor(entry: dict[str, Any]) -> str:
    """EAGLE's, of the ops that generated: the last measured."""
    rows = entry["parts"].get("roofline", {}).get("rows", [])
    found = [row for row in rows if row["decoding"] == "EAGLE"]
    return f"{found[-1]['floor_ms']:.2f}" if found else "–"
