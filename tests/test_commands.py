"""The scripts in the repository's root."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import save_pair

from eagle.model.ea_model import EaModel

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> dict:
    return runpy.run_path(str(ROOT / name), run_name="loaded")


@pytest.fixture
def setup_env() -> dict:
    return load("setup_env.py")


@pytest.fixture
def run_tests() -> dict:
    return load("run_tests.py")


def test_setup_env_finds_this_environment_ready():
    done = subprocess.run([sys.executable, "setup_env.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("Python", "torch", "transformers", "CUDA", "eagle generate"):
        assert name in done.stdout


def test_setup_env_needs_only_the_standard_library(tmp_path):
    # -S and -I leave out everything that is installed.
    done = subprocess.run([sys.executable, "-I", "-S", "setup_env.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "torch" in done.stdout
    assert "pip install -e ." in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("found", "least", "older"),
    [("2.10.0+cu128", (2, 11), True), ("2.11.0", (2, 11), False), ("2.9", (2, 11), True), ("3.0a1", (2, 11), False)],
)
def test_setup_env_compares_versions(setup_env, found, least, older):
    assert setup_env["is_older"](found, least) is older


def test_setup_env_says_how_to_upgrade(setup_env, monkeypatch, capsys):
    monkeypatch.setitem(setup_env["check_package"].__globals__, "found_version", lambda name: "2.9.1")
    assert setup_env["check_package"]("torch", (2, 11)) is False
    assert '"torch>=2.11"' in capsys.readouterr().out
    assert setup_env["check_package"]("triton", (3, 6), optional=True) is True


@pytest.mark.parametrize(
    ("script", "which", "code"),
    [([sys.executable, "run_tests.py"], "test_fail", 1), (["sh", "run_tests.sh"], "test_pass", 0)],
    ids=["py", "sh"],
)
def test_arguments_and_exit_code_pass_through(tmp_path, script, which, code):
    if shutil.which(script[0]) is None:
        pytest.skip(f"no {script[0]} here")
    (tmp_path / "test_small.py").write_text(
        "import os\ndef test_pass():\n    import torch\n"
        "    assert torch.cuda.is_available() or os.environ['TRITON_INTERPRET'] == '1'\ndef test_fail():\n    assert False\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        *script,
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path / "test_small.py"),
        "-k",
        which,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr


def patched(run_tests: dict, monkeypatch, **replaced) -> list[tuple[str, ...]]:
    """Replace functions of run_tests.py and record the commands it would run."""
    commands: list[tuple[str, ...]] = []

    def run(*command: str) -> int:
        commands.append(command)
        return 0

    names = run_tests["main"].__globals__
    for name, value in {"run": run, **replaced}.items():
        monkeypatch.setitem(names, name, value)
    return commands


def test_missing_packages_are_installed_in_a_venv(run_tests, monkeypatch, tmp_path):
    shared = []
    python = tmp_path / "python"
    commands = patched(
        run_tests, monkeypatch, venv_python=lambda: python, VENV=tmp_path, share_torch=lambda: shared.append(1)
    )
    assert run_tests["prepare_venv"]() is None
    assert commands[0] == (sys.executable, "-m", "venv", str(tmp_path))
    assert commands[-1][0] == str(python)
    assert commands[-1][-2:] == ("-e", ".[test]")
    assert "-qq" in commands[-1]
    assert shared == [1]


@pytest.mark.parametrize("missing", [["typer"], ["torch", "typer"]])
def test_one_line_says_how_long_the_installation_is_silent(run_tests, missing):
    line = run_tests["installing"](missing)
    assert "\n" not in line
    assert ("PyTorch" in line) == ("torch" in missing)
    assert "a minute or two" in line or "several minutes" in line


def test_failing_installation_is_told(run_tests, monkeypatch, tmp_path, capsys):
    patched(run_tests, monkeypatch, missing_here=lambda: ["torch"], missing_in_venv=lambda: ["torch"], run=lambda *c: 1)
    monkeypatch.setitem(run_tests["main"].__globals__, "venv_python", lambda: tmp_path / "python")
    assert run_tests["main"]([]) == 1
    assert "virtual environment" in capsys.readouterr().err


def test_the_venv_sees_an_outer_torch(run_tests, monkeypatch, tmp_path):
    """A real virtual environment without pip: what it imports as torch is this interpreter's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    monkeypatch.setitem(run_tests["share_torch"].__globals__, "VENV", tmp_path / "venv")
    run_tests["share_torch"]()
    code = "import importlib.util as u; print(u.find_spec('torch').origin)"
    python = str(run_tests["venv_python"]())
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    import torch

    assert Path(found.stdout.strip()) == Path(torch.__file__)
    assert "torch" not in run_tests["missing_in_venv"]()


def test_usage_example_runs(monkeypatch, capsys, tmp_path):
    pair = str(save_pair(tmp_path))
    original = EaModel.from_pretrained.__func__
    monkeypatch.setattr(EaModel, "from_pretrained", classmethod(lambda cls, name: original(cls, pair)))
    runpy.run_path(str(ROOT / "usage_example.py"), run_name="__main__")
    assert "accept length" in capsys.readouterr().out
