"""What a choice of kernels has to know about a machine. Does not import triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

LEAST_TRITON = (3, 6)


@dataclass(frozen=True)
class Hardware:
    """A device, and what Triton finds around it."""

    kind: str  # "cuda" (NVIDIA), "rocm" (AMD), or torch's name of another device type
    name: str  # the GPU's, or the device's
    capability: tuple[int, int] | None = None
    triton: tuple[int, int] | tuple[()] | None = (3, 6)  # its version, () if unknown, None if it is not installed
    compiler: bool = True  # a C compiler for Triton's launchers
    interpreted: bool = False  # TRITON_INTERPRET=1


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
    return Hardware(kind, torch.cuda.get_device_name(weakest), torch.cuda.get_device_capability(weakest), **around)


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
