"""Prompts for measuring acceptance: the project's own, or a file of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle.errors import InvalidInputError

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""24 prompts, 3 for each of MT-bench's 8 categories, written for this project."""

NO_CATEGORY = "all"


@dataclass(frozen=True)
class Prompt:
    """A first user turn and the category it is counted under."""

    text: str
    category: str = NO_CATEGORY
    place: str = field(default="", compare=False)
    """The file and the line it comes from."""


def read_prompts(path: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` prompts of a file, or of the project's own.

    The first line that is not blank decides how the file is read. If it begins with "{", each line is a JSON object:
    MT-bench's ``{"turns": [first, ...], "category": ...}``, of which only the first turn is used, or
    ``{"prompt": ..., "category": ...}``. Otherwise each line is a prompt.

    Raises InvalidInputError for a file that can't be read or holds no prompt, and for a bad line, which it names.
    """
    path = OWN_PROMPTS if path is None else path
    if limit is not None and limit <= 0:
        raise InvalidInputError(f"the limit is {limit}; expected at least 1 prompt")
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise InvalidInputError(f"cannot read the prompts in {path} ({error.strerror or error})") from error
    prompts: list[Prompt] = []
    as_json = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if as_json is None:
            as_json = line.lstrip().startswith(b"{")
            if line.lstrip().startswith(b"[") and (path.suffix == ".json" or _is_json(lines)):
                raise InvalidInputError(f"{path}, line {number}: a JSON array; expected one object a line")
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
            prompts.append(_from_json(text, place) if as_json else Prompt(text.strip(), place=place))
        except ValueError as error:
            raise InvalidInputError(f"{place}: {_reason(error)}") from error
        if len(prompts) == limit:
            break
    if not prompts:
        raise InvalidInputError(f"{path} holds no prompts; expected one a line")
    return prompts


def _is_json(lines: list[bytes]) -> bool:
    try:
        json.loads(b"\n".join(lines))
    except ValueError:
        return False
    return True


def _from_json(line: str, place: str) -> Prompt:
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError('expected a JSON object with "turns" or "prompt"')
    category = entry.get("category", NO_CATEGORY)
    if not isinstance(category, str) or not category:
        raise ValueError(f'"category" is {category!r}; expected a name')
    return Prompt(_first_turn(entry), category, place)


def _first_turn(entry: dict[str, Any]) -> str:
    if "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError('"turns" is no list of texts')
        text, where = turns[0], "the first turn"
    elif "prompt" in entry:
        text, where = entry["prompt"], '"prompt"'
    else:
        raise ValueError(f'neither "turns" nor "prompt" among {sorted(entry)}')
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} is {text!r}; expected a text")
    return text


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "not valid UTF-8"
    return str(error)
