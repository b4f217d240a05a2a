"""What a choice of kernels has to know about a machine. Does not import triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

LEAST_TRITON = (3, 6)
FLASH_MODULES = {3: "flash_attn_interface", 2: "flash_attn"}
FLASH_DISTRIBUTIONS = {3: "flash_attn_3", 2: "flash_attn"}
LEAST_FLASH = (2, 6)
"""`flash_attn_with_kvcache` takes ``softcap`` from here on."""


@dataclass(frozen=True)
class FlashAttention:
    """A FlashAttention package that is installed, and whether it can be used."""

    module: str  # that holds flash_attn_with_kvcache
    version: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"FlashAttention {self.version}"


@dataclass(frozen=True)
class Hardware:
    """A device, and what Triton finds around it."""

    kind: str  # "cuda" (NVIDIA), "rocm" (AMD), or torch's name of another device type
    name: str  # the GPU's, or the device's
    capability: tuple[int, int] | None = None
    triton: tuple[int, int] | tuple[()] | None = (3, 6)  # its version, () if unknown, None if it is not installed
    compiler: bool = True  # a C compiler for Triton's launchers
    interpreted: bool = False  # TRITON_INTERPRET=1
    flash: FlashAttention | None = None  # None if it is not installed, or there is no GPU for it


def hardware(devices: Iterable[torch.device] | torch.device) -> Hardware:
    """The traits of a device, or of the weakest of several: one that is no GPU, else the lowest capability."""
    devices = {devices} if isinstance(devices, torch.device) else set(devices)
    around = {
        "triton": triton_version(),
        "compiler": any(os.environ.get("CC") or shutil.which(name) for name in ("gcc", "clang", "cc")),
        "interpreted": os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"),
    }
    others = sorted(str(device) for device in devices if device.type != "cuda")
    if others:
        kind = torch.device(others[0]).type
        return Hardware(kind, kind if len(devices) == 1 else f"{others[0]}, which holds a part of the model", **around)
    kind = "rocm" if torch.version.hip else "cuda"
    weakest = min(devices, key=torch.cuda.get_device_capability)
    capability = torch.cuda.get_device_capability(weakest)
    flash = find_flash(capability) if kind == "cuda" else None
    return Hardware(kind, torch.cuda.get_device_name(weakest), capability, flash=flash, **around)


def default_hardware() -> Hardware:
    """The traits of the device a model is put on by default."""
    return hardware(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def triton_version() -> tuple[int, int] | tuple[()] | None:
    """Triton's version, () where its distribution goes by another name, None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        major, minor = version("triton").split("+")[0].split(".")[:2]
        return int(major), int(minor)
    except (PackageNotFoundError, ValueError):
        return ()


@lru_cache
def find_flash(capability: tuple[int, int]) -> FlashAttention | None:
    """The FlashAttention package for GPUs of a capability: 3 on Hopper where it is installed, else 2, else None.

    Imports it, because a build for another torch is only found out so.
    """
    wanted = [generation for generation in (3, 2) if generation == 2 or capability[0] == 9]
    found = next((g for g in wanted if importlib.util.find_spec(FLASH_MODULES[g]) is not None), None)
    if found is None:
        return None
    module = FLASH_MODULES[found]
    try:
        known = version(FLASH_DISTRIBUTIONS[found])
    except PackageNotFoundError:
        known = str(found)
    problem = None
    try:
        if not hasattr(importlib.import_module(module), "flash_attn_with_kvcache"):
            problem = f"{module} has no flash_attn_with_kvcache"
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        problem = f"{module} does not import ({str(error).splitlines()[0]})"
    parts = re.findall(r"\d+", known)[:2]
    if found == 2 and problem is None and len(parts) == 2 and tuple(map(int, parts)) < LEAST_FLASH:
        problem = f"it is older than {'.'.join(map(str, LEAST_FLASH))}"
    return FlashAttention(module, known, problem)
