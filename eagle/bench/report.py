"""A report's contents: one JSON object that grows part by part, on disk after each, so that a run that is cut off leaves
what it found. Markdown and HTML are made from it alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle.errors import EagleError, InvalidInputError

FORMAT = 1
PARTS = ("kernels", "generate", "roofline", "sweep", "accept", "peers")
MODEL_PARTS = ("generate", "roofline", "sweep", "accept")
"""Those that need the model loaded here."""
NAME = "report"

Content = dict[str, Any]


def new_content(origin: dict[str, Any], gpu: bool) -> Content:
    """A report with nothing in it yet. origin: of `eagle.bench.provenance.provenance`, with the settings."""
    return {
        "format": FORMAT,
        "device": origin["device"],
        "gpu": gpu,
        "runs": [origin | {"complete": False}],
        "kernels": None,
        "models": {},
    }


def read_content(path: Path) -> Content:
    """A report from disk. Raises InvalidInputError where it is none, or one of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"cannot read the report {path} ({error.strerror or error})") from error
    except ValueError as error:
        raise InvalidInputError(f"{path} is not valid JSON ({error}); expected a report.json") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidInputError(f"{path} is no report of format {FORMAT}; make it anew with 'eagle bench report'")
    return content


def opened(folder: Path, origin: dict[str, Any], gpu: bool, add: bool) -> Content:
    """The content to fill: a new one, or with ``add`` the folder's, where there is one.

    Raises InvalidInputError where the folder's was measured on another device.
    """
    path = folder / f"{NAME}.json"
    if not add or not path.exists():
        return new_content(origin, gpu)
    content = read_content(path)
    if content["device"] != origin["device"]:
        raise InvalidInputError(
            f"{path} was measured on {content['device']}, this is {origin['device']}; give another folder as --out"
        )
    content["runs"].append(origin | {"complete": False})
    return content


def record(content: Content, model: str, part: str, result: dict[str, Any]) -> None:
    """Put one part's result in the place of an earlier one."""
    content["models"].setdefault(model, {"parts": {}})["parts"][part] = result


def ran(content: Content, models: Sequence[str], parts: Sequence[str]) -> Content:
    """The content of one run: the models and parts it was asked for, without what earlier runs left beside them."""
    loads = any(part in MODEL_PARTS for part in parts)
    kept = {}
    for name in models:
        entry = dict(content["models"].get(name, {"parts": {}}))
        if not loads:
            entry.pop("error", None)
        kept[name] = entry | {"parts": {part: entry["parts"][part] for part in parts if part in entry["parts"]}}
    return content | {"kernels": content["kernels"] if "kernels" in parts else None, "models": kept}


def measured(content: Content) -> bool:
    """Whether any part has a result."""
    parts = [part for entry in content["models"].values() for part in entry["parts"].values()]
    return any(part is not None and "error" not in part for part in (content["kernels"], *parts))


def failures(content: Content) -> list[str]:
    """What went wrong, a line each."""
    found = [f"kernel {row['op']}, {row['label']}, {row['dtype']}: {row['reason']}" for row in red_rows(content)]
    if "error" in (content["kernels"] or {}):
        found.append(f"kernels: {content['kernels']['error']}")
    for name, entry in content["models"].items():
        if "error" in entry:
            found.append(f"{name}: {entry['error']}")
        found += [f"{name}, {part}: {result['error']}" for part, result in entry["parts"].items() if "error" in result]
        found += [
            f"{name}, {row['engine']}, {row['setting']}: {row['reason']}"
            for row in entry["parts"].get("peers", {}).get("rows", ())
            if row["state"] == "failed"
        ]
    return found


def red_rows(content: Content) -> list[dict[str, Any]]:
    """The kernels that were wrong or failed."""
    return [row for row in (content["kernels"] or {}).get("rows", ()) if row["state"] == "red"]


def save(content: Content, folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html, each whole or not at all. Raises EagleError."""
    from eagle.bench.report_html import html
    from eagle.bench.report_markdown import markdown

    texts = {
        "json": json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "md": markdown(content),
        "html": html(content),
    }
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            path = folder / f"{NAME}.{suffix}"
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(path)
            paths.append(path)
    except OSError as error:
        raise EagleError(
            f"cannot write to {folder} ({error.strerror or error}); give another folder as --out"
        ) from error
    return paths
