#!/usr/bin/env python3
"""Check this machine for eagle-triton-kernels: what is here, and what to do about what is missing.

Needs only the standard library, so it runs before anything is installed. Exit code 0: the package can run here, even
if only on the CPU. 1: it can't yet.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

LEAST_PYTHON = (3, 10)
REQUIRED = {"torch": (2, 11), "transformers": (5, 17)}
TRITON = (3, 6)
OTHERS = ("safetensors", "huggingface-hub", "gguf", "accelerate", "filelock", "platformdirs", "rich", "typer")
INSTALL = f"{sys.executable} -m pip install -e ."


def dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def found_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_older(found: str, least: tuple[int, ...]) -> bool:
    """Whether "2.10.0+cpu" is below (2, 11)."""
    return tuple(int(number) for number in re.findall(r"\d+", found)[: len(least)]) < least


def line(mark: str, name: str, found: str, advice: str = "") -> None:
    """One finding: ok, note (works without) or MISSING, and what to do."""
    print(f"[{mark:^7}] {name:<20} {found}")
    if advice:
        print(f"          -> {advice}")


def check_python() -> bool:
    """Python's version."""
    good = sys.version_info[:2] >= LEAST_PYTHON
    advice = "" if good else f"install Python {dotted(LEAST_PYTHON)} or newer and run this with it"
    line("ok" if good else "MISSING", "Python", f"{platform.python_version()} ({sys.executable})", advice)
    return good


def check_package(name: str, least: tuple[int, ...] = (), optional: bool = False) -> bool:
    """One distribution; ``optional`` ones never fail the check."""
    found = found_version(name)
    wanted = f" >= {dotted(least)}" if least else ""
    if found is None:
        line("note" if optional else "MISSING", name, f"not installed{wanted and ', expected' + wanted}", INSTALL)
        return optional
    if least and is_older(found, least):
        advice = f'{sys.executable} -m pip install --upgrade "{name}>={dotted(least)}"'
        line("note" if optional else "MISSING", name, f"{found}, expected{wanted}", advice)
        return optional
    line("ok", name, found)
    return True


def nvidia_gpus() -> list[str]:
    """Name and driver of each GPU that nvidia-smi lists."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def check_devices() -> bool:
    """CUDA and GPUs, as nvidia-smi and torch see them. False only if torch is installed and doesn't import."""
    gpus = nvidia_gpus()
    for gpu in gpus:
        line("ok", "NVIDIA GPU", gpu)
    if found_version("torch") is None:
        if not gpus:
            line("note", "NVIDIA GPU", "none found: the package will run on the CPU, slowly")
        return True
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so before NumPy is installed
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        line(
            "MISSING", "torch", f"does not import: {str(error).splitlines()[0]}", "reinstall torch: https://pytorch.org"
        )
        return False
    if torch.cuda.is_available():
        line(
            "ok",
            "CUDA",
            f"{torch.version.cuda or 'ROCm ' + str(torch.version.hip)}, {torch.cuda.device_count()} GPU(s)",
        )
    elif gpus:
        advice = "install the torch build for this driver: https://pytorch.org/get-started/locally"
        line("note", "CUDA", f"torch {torch.__version__} sees no GPU; the CPU serves", advice)
    else:
        line("note", "CUDA", "no GPU: the package runs on the CPU, slowly")
    return True


def main() -> int:
    """Print the findings and return the exit code."""
    print(f"{platform.system()} {platform.machine()}")
    good = [check_python()]
    good += [check_package(name, least) for name, least in REQUIRED.items()]
    if platform.system() == "Linux":
        good.append(check_package("triton", TRITON, optional=True))
    else:
        line("note", "triton", f"not made for {platform.system()}: PyTorch serves every op")
    good += [check_package(name) for name in OTHERS]
    good.append(check_package("eagle-triton-kernels", optional=True))
    good.append(check_devices())
    if all(good):
        print('Ready. Try: eagle generate --compare "Explain gravity in two sentences."')
        return 0
    print(f"Not ready. Follow the arrows above; '{INSTALL}' in this folder installs every package.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
