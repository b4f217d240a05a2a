"""`eagle doctor`: what is here, what serves each op and why, and how to mend what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import typer

from eagle import __version__
from eagle.commands.options import MODEL_DEFAULT, JsonOption
from eagle.errors import InvalidInputError
from eagle.versions import installed_version

VARIABLES = "EAGLE_KERNELS and EAGLE_KERNELS_<OP>"
PYTORCH = ("torch", "sdpa")
RUNNING_WORDS = {"step": "execution", "tuned": "tuned settings"}
LEAST = {"torch": (2, 11), "transformers": (5, 17), "triton": (3, 6)}


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices and which implementation serves each op. Exit code 1 if the package can't run here."""
    report = diagnose()
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_report(report)
    raise typer.Exit(0 if report["can_run"] else 1)


def diagnose() -> dict[str, Any]:
    """Everything `eagle doctor` knows, as plain data."""
    versions = {"eagle": __version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) for name in LEAST}
    versions["flash-attn"] = installed_version("flash_attn_3") or installed_version("flash-attn")
    problems = version_problems(versions)
    devices = torch_devices() if versions["torch"] else {"cuda": None, "gpus": [], "error": None}
    if devices["error"]:
        problems.append(problem(f"torch does not import: {devices['error']}", "reinstall torch", fatal=True))
    versions |= {"cuda": devices["cuda"], "driver": driver_version()}
    if versions["driver"] and not devices["gpus"] and not devices["error"]:
        problems.append(
            problem(
                f"an NVIDIA driver ({versions['driver']}) is here, but torch sees no GPU (CUDA {versions['cuda']})",
                "install the torch build for this driver: https://pytorch.org/get-started/locally",
            )
        )
    cache = cache_report()
    problems += cache_problems(cache)
    ops, running = {}, {}
    if not any(entry["fatal"] for entry in problems):
        try:
            ops = op_report()
            running, found = run_report(ops)
            problems += found
        except InvalidInputError as error:
            problems.append(problem(str(error), f"unset {VARIABLES}, or set them to auto", fatal=True))
    return {
        "can_run": not any(entry["fatal"] for entry in problems),
        "versions": versions,
        "platform": platform.platform(),
        "gpus": devices["gpus"],
        "cache": cache,
        "ops": ops,
        "running": running,
        "problems": problems,
    }


def op_report() -> dict[str, dict[str, str]]:
    """What `optimize_eagle_with_triton` would have serve each op here, by itself or as the environment asks, and why.

    In bfloat16 on a GPU and float32 elsewhere. Where several serve an op, each stands with its calls. Raises
    InvalidInputError where the environment asks for what there is not.
    """
    import torch

    from eagle.model.triton_kernels.hardware import default_hardware
    from eagle.model.triton_kernels.selection import OPS, Plan, from_environment

    hardware, (request, overrides) = default_hardware(), from_environment()
    dtype = torch.bfloat16 if hardware.kind == "cuda" else torch.float32
    plan = Plan(hardware, dtype, request, overrides)
    choices = {op: plan.choices(op, {}) for op in OPS}
    return {
        op: {
            "implementation": ", ".join(
                f"{c.implementation} ({c.when})" if c.when else c.implementation for c in found
            ),
            "why": "; ".join(dict.fromkeys(c.reason for c in found)),
        }
        for op, found in choices.items()
    }


def run_report(ops: dict[str, dict[str, str]]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """How a step would run and where the linears' launch configurations come from, and what is wrong with either."""
    from eagle.model.triton_kernels.hardware import default_hardware
    from eagle.model.triton_kernels.tuned_table import VARIABLE, shipped, tuned_linears

    hardware, problems = default_hardware(), []
    kernels = any("triton" in entry["implementation"] for entry in ops.values())
    if hardware.kind != "cuda":
        if (own := os.environ.get(VARIABLE)) and not Path(own).is_file():
            words = f"{VARIABLE} is {own!r}, which is no file; without a GPU nothing reads it"
            problems.append(problem(words, f"unset {VARIABLE}, or name a table of 'eagle bench tune'"))
        step = f"op by op: a capture needs an NVIDIA GPU, not {hardware.name}"
        return {"step": step, "tuned": "none: no GPU"}, problems
    step = "captured, one CUDA graph a step" if kernels else "op by op: no kernel serves, so the engine stays as loaded"
    if hardware.flash is not None and hardware.flash.problem is not None:
        words = f"{hardware.flash} can't be used: {hardware.flash.problem}"
        problems.append(problem(words, "reinstall flash-attn for this torch, or ignore it: kernels and SDPA serve"))
    try:
        shapes = len(tuned_linears(hardware.name))
    except ValueError as error:
        problems.append(problem(str(error), f"unset {VARIABLE}, or name a table of 'eagle bench tune'", fatal=True))
        return {"step": step, "tuned": "none"}, problems
    own = [f"{os.environ[VARIABLE]} ({VARIABLE})"] if os.environ.get(VARIABLE) else []
    sources = " before ".join([*own, *reversed(shipped(hardware.name))])
    tuned = f"{shapes} shapes: {sources}" if shapes else "none: by rule ('eagle bench tune' makes one)"
    return {"step": step, "tuned": tuned}, problems


def version_problems(versions: dict[str, str | None]) -> list[dict[str, Any]]:
    """What is missing or too old. Triton only matters where it exists, and nothing here needs it to run."""
    problems = []
    for name, least in LEAST.items():
        wanted = ".".join(map(str, least))
        found = versions[name]
        optional = name == "triton"
        if optional and platform.system() != "Linux":
            continue
        if found is None:
            problems.append(problem(f"{name} is not installed", f"pip install '{name}>={wanted}'", fatal=not optional))
        elif tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < least:
            words = f"{name} is {found}, at least {wanted} is needed"
            problems.append(problem(words, f"pip install --upgrade '{name}>={wanted}'", fatal=not optional))
    return problems


def problem(what: str, fix: str, *, fatal: bool = False) -> dict[str, Any]:
    """One finding; ``fatal`` where the package can't run with it."""
    return {"problem": what, "fix": fix, "fatal": fatal}


def torch_devices() -> dict[str, Any]:
    """What torch sees: its CUDA version, its GPUs with memory in GiB, or why it does not import."""
    if importlib.util.find_spec("torch") is None:
        return {"cuda": None, "gpus": [], "error": "no such module"}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return {"cuda": None, "gpus": [], "error": str(error).splitlines()[0]}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"cuda": torch.version.cuda, "gpus": gpus, "error": None}


def driver_version() -> str | None:
    """The NVIDIA driver's version by nvidia-smi, or None."""
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def cache_report() -> dict[str, Any]:
    """The cache folder and whether the default model lies there whole."""
    from eagle.model.embedded import SMOLLM2, cache_folder, is_complete

    folder = cache_folder()
    return {
        "folder": str(folder),
        "from_EAGLE_CACHE": bool(os.environ.get("EAGLE_CACHE")),
        "default_model": MODEL_DEFAULT,
        "default_model_present": is_complete(folder / "models" / SMOLLM2.name),
    }


def cache_problems(cache: dict[str, Any]) -> list[dict[str, Any]]:
    """What keeps the default model from being there."""
    from eagle.model.embedded import LOCAL_FILE_VARIABLE

    if Path(cache["folder"]).is_file():
        return [problem(f"the cache folder {cache['folder']} is a file", "set EAGLE_CACHE to a folder", fatal=True)]
    if cache["default_model_present"]:
        return []
    wheel = os.environ.get(LOCAL_FILE_VARIABLE)
    if wheel and not Path(wheel).expanduser().is_file():
        words = f"{MODEL_DEFAULT} is not in the cache yet, and {LOCAL_FILE_VARIABLE} is {wheel!r}, which is no file"
        return [problem(words, "set it to the wheel, or unset it", fatal=True)]
    return [problem(f"{MODEL_DEFAULT} is not in the cache yet", "run 'eagle fetch' (once, with a network)")]


def ops_heading(ops: dict[str, dict[str, str]]) -> str:
    """What the list of ops shows; where PyTorch serves them all, that this is no fault."""
    heading = "what computes each operation of a decoding step"
    if all(entry["implementation"] in PYTORCH for entry in ops.values()):
        return (
            f"{heading}: PyTorch itself ({', '.join(PYTORCH)}), which works everywhere; Triton kernels would be faster"
        )
    return f"{heading}, in the commands, and in Python after optimize_eagle_with_triton"


def print_report(report: dict[str, Any]) -> None:
    """The report as lines of text."""
    for name, found in report["versions"].items():
        print(f"{name:<13} {found or '-'}")
    print(f"{'platform':<13} {report['platform']}")
    for gpu in report["gpus"]:
        print(f"{'GPU':<13} {gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}")
    if not report["gpus"]:
        print(f"{'GPU':<13} none: the CPU serves")
    cache = report["cache"]
    print(f"{'cache':<13} {cache['folder']}{' (EAGLE_CACHE)' if cache['from_EAGLE_CACHE'] else ''}")
    print(f"{'default model':<13} {cache['default_model']}, {'there' if cache['default_model_present'] else 'missing'}")
    if report["ops"]:
        print(f"\n{ops_heading(report['ops'])}")
        for name, entry in report["ops"].items():
            print(f"  {name:<20} {entry['implementation']}: {entry['why']}")
        print("\nhow a step runs")
        for name, words in report["running"].items():
            print(f"  {RUNNING_WORDS[name]:<20} {words}")
    if report["problems"]:
        print("\nto do")
        for entry in report["problems"]:
            print(f"  {entry['problem']}: {entry['fix']}")
    print("\nthe package can run here" if report["can_run"] else "\nthe package can't run here yet")
