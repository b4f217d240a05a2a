"""`eagle train` hands its flags to the trainer unchanged."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from eagle.cli import main
from eagle.train.options import TrainOptions


@pytest.fixture
def asked(monkeypatch) -> list[TrainOptions]:
    calls: list[TrainOptions] = []
    monkeypatch.setattr("eagle.train.run.train", calls.append)
    return calls


def test_defaults_are_the_trainers(asked, tmp_path):
    assert main(["train", "--model", "m", "--out", str(tmp_path)]) == 0
    found, wanted = asdict(asked[0]), asdict(TrainOptions("m", tmp_path))
    assert found.pop("command").startswith("eagle train")
    wanted.pop("command")
    assert found == wanted


def test_every_option_has_a_flag(asked, tmp_path, monkeypatch):
    changed = {"model": "m", "out": tmp_path, "data": Path("d.jsonl"), "data_folder": Path("f"), "share_lm_head": True}
    changed |= {"attention": "dense", "compile": "off", "device": "cpu", "omit_lm_head": True, "generate_only": True}
    changed |= {
        "steps": 3,
        "intermediate_size": 48,
        "pause_after": 2.5,
        "resume": True,
        "minutes": None,
        "name": "m-1b",
    }
    changed |= {"overwrite": False, "generate_rows": 64}
    for field in fields(TrainOptions):
        if field.name in changed or field.name == "command":
            continue
        changed[field.name] = field.default + 1 if isinstance(field.default, int) else field.default / 2
    arguments = ["train"]
    for name, value in changed.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value not in (None, False):
            arguments += [flag, str(value)]
    monkeypatch.setattr("sys.argv", ["eagle", *arguments])
    assert main(arguments) == 0
    found = asdict(asked[0])
    recorded = [word for word in arguments if word not in ("--resume", "--pause-after", "2.5")]
    assert shlex.split(found.pop("command")) == ["eagle", *recorded]
    assert found == changed


@pytest.mark.parametrize(
    "flags", [["--lr", "0"], ["--steps", "2", "--minutes", "1"], ["--resume", "--overwrite"], ["--attention", "x"]]
)
def test_bad_flags(asked, capsys, tmp_path, flags):
    assert main(["train", "--model", "m", "--out", str(tmp_path), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not asked
