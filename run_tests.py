#!/usr/bin/env python3
"""Run the tests; arguments go to pytest, and its exit code comes back.

With --detailed-report: run the kernels' tests and then `eagle bench kernels`, which gets the arguments after `--`. A red
test means that no timing is reported, and exit code 1; where no test could run, pytest's exit code comes back.

Where this interpreter lacks a package that the tests need, a virtual environment `.venv` is made beside this file and
the project is installed in it with its `test` extra, by pip as it is configured. Needs only the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

MOST_WORKERS = 4
"""Processes that run tests side by side: each holds torch, and on a GPU its own context."""

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
REPORT = "--detailed-report"
KERNEL_TESTS = "test_triton_*.py"
MODULES = ("torch", "transformers", "safetensors", "huggingface_hub", "gguf", "accelerate", "filelock", "platformdirs")
MODULES += ("rich", "typer", "pytest", "pytest_timeout", "xdist", "hypothesis", "scipy", "matplotlib")
NOT_RUN = {4: "pytest could not begin (arguments of the report go after --)", 5: "no test was chosen"}
"""Exit codes of pytest where no test has run."""
FIND_MISSING = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
SEES_GPU = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"


def missing_here() -> list[str]:
    """Modules that this interpreter lacks."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def venv_python() -> Path:
    """The interpreter of `.venv`, which may not exist yet."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def missing_in_venv() -> list[str]:
    """Modules that `.venv` lacks; all of them where there is no `.venv`."""
    if not venv_python().exists():
        return list(MODULES)
    done = subprocess.run([venv_python(), "-c", FIND_MISSING, *MODULES], capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else list(MODULES)


def prepare_venv() -> str | None:
    """Make `.venv` and install the project in it. → what went wrong, or None."""
    if not venv_python().exists():
        print(f"Making {VENV}", flush=True)
        if run(sys.executable, "-m", "venv", str(VENV)):
            return "cannot make a virtual environment; on Debian and Ubuntu install python3-venv"
        share_torch()
    python = str(venv_python())
    if run(python, "-c", "import pip") and run(python, "-m", "ensurepip"):
        return f"{VENV} has no pip and cannot get it; remove it to start afresh"
    print(installing(missing_in_venv()), flush=True)
    if run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-e", ".[test]"):
        return f"the installation failed; pip's message is above. Mend it, or remove {VENV} to start afresh"
    return None


def installing(missing: list[str]) -> str:
    """What pip is about to do, and for how long it may be silent."""
    what = f"Installing the package and what its tests need in {VENV.name}, on this first run only"
    if "torch" in missing:
        return (
            f"{what}: several minutes without a word, more on a slow line: PyTorch comes too (gigabytes, if for CUDA)"
        )
    return f"{what}: a minute or two without a word, more on a slow line"


def share_torch() -> None:
    """Let `.venv` see the packages beside this interpreter's torch, which is large and may be a build chosen with care.

    What pip finds unfit there, it installs in `.venv`, which goes before.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return
    query = [str(venv_python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    (site_packages / "packages_of_the_outer_interpreter.pth").write_text(f"{Path(torch.origin).parents[1]}\n")


def run(*command: str) -> int:
    """Run a command in this folder. → its exit code."""
    return subprocess.run(command, cwd=HERE, check=False).returncode


def side_by_side(arguments: list[str]) -> list[str]:
    """pytest's arguments for running tests in several processes, unless the user's say how, or ask for a debugger."""
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    own = any(argument.startswith(("-n", "--numprocesses", "--pdb", "--trace", "-s")) for argument in arguments)
    return [] if own or workers == 1 else ["-n", str(workers)]


def main(arguments: list[str]) -> int:
    """Find or make an interpreter that can run the tests, and run them."""
    python = sys.executable
    if missing_here():
        if missing_in_venv() and (problem := prepare_venv()):
            print(f"error: {problem}", file=sys.stderr)
            return 1
        python = str(venv_python())
    environment = dict(os.environ)
    if subprocess.run([python, "-c", SEES_GPU], stderr=subprocess.DEVNULL, check=False).returncode:
        environment.setdefault("TRITON_INTERPRET", "1")
    if REPORT in arguments:
        return detailed_report(python, [argument for argument in arguments if argument != REPORT], environment)
    command = [python, "-m", "pytest", *side_by_side(arguments), *arguments]
    return subprocess.run(command, cwd=HERE, env=environment, check=False).returncode


def detailed_report(python: str, arguments: list[str], environment: dict[str, str]) -> int:
    """The kernels' tests, then their report. Arguments after `--` are the report's, those before it pytest's."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    tests = sorted(str(path.relative_to(HERE)) for path in (HERE / "tests").glob(KERNEL_TESTS))
    command = [python, "-m", "pytest", *side_by_side(arguments[:cut]), *tests, *arguments[:cut]]
    if code := subprocess.run(command, cwd=HERE, env=environment, check=False).returncode:
        print(f"error: {NOT_RUN.get(code, 'a test is red')}, so no timing is reported", file=sys.stderr)
        return code if code in NOT_RUN else 1
    command = [python, "-m", "eagle.cli", "bench", "kernels", *arguments[cut + 1 :]]
    return subprocess.run(command, cwd=HERE, env=environment, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
