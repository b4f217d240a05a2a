"""`eagle fetch` and `eagle models`: weights ahead of time, and the names they go by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eagle.commands.options import MODEL_DEFAULT, DraftOption


def fetch(
    name: Annotated[str, typer.Argument(help="A name from 'eagle models', or a hub id.")] = MODEL_DEFAULT,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write plain folders, target and head, here instead of the caches.")
    ] = None,
    draft: DraftOption = None,
) -> None:
    """Get a model and its head now, so that later runs need no network."""
    from eagle.model.fetch import fetch as fetch_model

    for folder in fetch_model(name, out, ea_model_path=draft):
        print(folder)


def models() -> None:
    """List the names that --model takes."""
    from eagle.model.presets import PRESETS

    width = max(map(len, PRESETS))
    for preset in PRESETS.values():
        print(f"{preset.name:<{width}}  {preset.about}")
