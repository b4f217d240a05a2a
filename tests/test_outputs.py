"""What can't be written is refused before anything is loaded or measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eagle.cli import main
from eagle.commands.outputs import check_out, check_plot, writing
from eagle.errors import EagleError, InvalidInputError

NOWHERE = Path("/proc/x")
"""Linux lets nobody, root included, write there."""
linux_only = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")


def test_a_good_place_is_made_and_left_empty(tmp_path: Path) -> None:
    check_out(None)
    check_out(tmp_path / "a" / "b.json")
    check_out(tmp_path / "c", folder=True)
    check_out(tmp_path / "c", folder=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "c"]


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text("{}")
    check_out(path)
    assert path.read_text() == "{}"


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    taken = tmp_path / "taken.png"
    taken.mkdir()
    with pytest.raises(InvalidInputError, match="which is a folder"):
        check_out(taken)
    with pytest.raises(InvalidInputError, match=r"--plot is .*taken\.png, which is a folder"):
        check_plot(taken)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="which is a file"):
        check_out(tmp_path / "file", folder=True)
    for path, folder in ((tmp_path / "file" / "x", True), (tmp_path / "file" / "x.json", False)):
        with pytest.raises(InvalidInputError, match="cannot write to"):
            check_out(path, folder=folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions")
def test_a_file_that_must_not_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "locked.json"
    path.touch(0o444)
    with pytest.raises(InvalidInputError, match="cannot write to"):
        check_out(path)


def test_a_write_that_fails_after_all(tmp_path: Path) -> None:
    with pytest.raises(EagleError, match="cannot write to here"), writing(Path("here")):
        raise OSError(28, "No space left on device")


@linux_only
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["generate"], "--out"),
        (["equality"], "--out"),
        (["step"], "--out"),
        (["kernels", "--quick", "--ops", "rms_norm"], "--out"),
        (["peers"], "--logs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
@pytest.mark.parametrize("path", [NOWHERE, NOWHERE / "e.json"], ids=["x", "x-e"])
def test_each_command_refuses_at_once(command, option, path, capsys, monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("eagle.bench.load.prepare", load)
    monkeypatch.setattr("eagle.model.fetch.fetch", load)
    monkeypatch.setattr("eagle.bench.kernels.run_cases", load)
    assert main(["bench", *command, option, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} is {path}: cannot write to /proc")
    assert error.count("\n") == 1
