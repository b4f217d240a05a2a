"""Where a measurement comes from: command, date, commit, versions, device, driver and clocks."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eagle import __version__

CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to run a measurement again, as JSON values."""
    found: dict[str, Any] = {
        "command": command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "eagle": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": f"CPU ({torch.get_num_threads()} threads)",
    }
    if device.type == "cuda":
        traits = torch.cuda.get_device_properties(device)
        found |= {
            "device": traits.name,
            "capability": f"{traits.major}.{traits.minor}",
            "multiprocessors": traits.multi_processor_count,
            "memory_gib": round(traits.total_memory / 2**30, 1),
            "l2_mib": round(traits.L2_cache_size / 2**20, 1),
        }
    return found


def command_line() -> str:
    """What was typed: a script of the project by its name, otherwise ``eagle`` and its arguments."""
    name = Path(sys.argv[0]).name
    script = name.endswith(".py") and name != "cli.py"
    return shlex.join([*(["python", name] if script else ["eagle"]), *sys.argv[1:]])


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the device now, or None where there is no nvidia-smi."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", f"--id={identity}"]
    done = _output(query)
    return None if done is None else dict(zip(CLOCKS, (part.strip() for part in done.split(",")), strict=False))


def git_commit() -> str | None:
    """The commit of the source tree the package runs from, with "+changes" where files differ; None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit if not commit or not changes else f"{commit}+changes"


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:  # as on macOS and Windows
        return None
    import triton

    return triton.__version__


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
