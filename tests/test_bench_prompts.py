"""Prompt files: what they may be, and which line is to blame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle.bench.prompts import read_prompts
from eagle.errors import InvalidInputError


def write(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", json.dumps([{"prompt": "a"}, {"prompt": "b"}])),
        ("prompts.txt", json.dumps(["a", "b"], indent=1)),
        ("prompts.json", '[\n {"prompt": "a"},\n'),
        ("prompts.jsonl", '["a", "b"]\n'),
    ],
)
def test_an_array_is_refused(tmp_path, name, text):
    path = write(tmp_path, text, name)
    with pytest.raises(InvalidInputError, match=r"line 1: a JSON array; expected one object a line"):
        read_prompts(path)


def test_the_array_is_named_by_its_line(tmp_path):
    with pytest.raises(InvalidInputError, match="line 3: a JSON array"):
        read_prompts(write(tmp_path, '\n\n["a"]'))


def test_a_text_may_begin_with_a_bracket(tmp_path):
    path = write(tmp_path, "[1] What is a quark?\n[2] And a lepton?\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["[1] What is a quark?", "[2] And a lepton?"]


def test_prompts_know_their_lines(tmp_path):
    path = write(tmp_path, '\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [prompt.place for prompt in read_prompts(path)] == [f"{path}, line 2", f"{path}, line 4"]
    assert read_prompts(path, 1)[0].place == f"{path}, line 2"
