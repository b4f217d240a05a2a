"""Whether weights fit a device, said before they are loaded."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import torch

from eagle.errors import OutOfMemoryError

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "U64": 64, "U32": 32, "U16": 16}
_FLOATS = ("F64", "F32", "F16", "BF16")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(folder: Path, dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuse the model of ``folder`` where its weights alone, in ``dtype`` (None: as stored), exceed what ``device`` has.

    A GPU is measured by what is free now, a CPU by all of its memory: what other programs hold may be swapped out.
    Activations and caches are not counted; other kinds of device are not judged.

    Raises:
        OutOfMemoryError: naming both sizes.
    """
    check_fits(weight_bytes(folder, dtype), device, f"the weights in {folder}", dtype)


def check_fits(needed: int, device: torch.device, what: str, dtype: torch.dtype | None = None) -> None:
    """Raises OutOfMemoryError where ``needed`` bytes of ``what`` exceed what ``device`` has."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device)
        # What torch keeps for reuse counts as free.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        there = f"{torch.cuda.get_device_name(device)} has {_gigabytes(free)} free of {_gigabytes(total)}"
        advice = "free some, load a narrower dtype, or spread the model with device_map='auto'"
    elif device.type == "cpu" and (memory := host_memory()) is not None:
        free, there = memory, f"this machine has {_gigabytes(memory)} of memory"
        advice = "take a smaller model" + (" or dtype bfloat16" if dtype in (torch.float32, torch.float64) else "")
    else:
        return
    if needed > free:
        kind = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise OutOfMemoryError(f"{what} take {_gigabytes(needed)}{kind}, and {there}: {advice}")


def weight_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes that the weights of ``folder`` take in memory, floating-point ones in ``dtype`` (None: as stored).

    Only the headers of safetensors files are read. Pickles, and files without a proper header, count as they lie on disk.
    """
    if not (paths := _safetensors(folder)):
        return sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin"))
    return sum(_file_bytes(path, dtype) for path in paths)


def host_memory() -> int | None:
    """Bytes of memory this machine has, or its container may use; None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return total


def _safetensors(folder: Path) -> list[Path]:
    """The files transformers would read: those of the index, the one without, or whatever there is."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading will say so, if it needs the index
        return sorted(folder.glob("*.safetensors"))
    return sorted(path for name in names if (path := folder / str(name)).is_file())


def _file_bytes(path: Path, dtype: torch.dtype | None) -> int:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        total = 0
        for entry in entries:
            bits = _BITS.get(entry["dtype"], 8)
            if dtype is not None and entry["dtype"] in _FLOATS:
                bits = 8 * dtype.itemsize
            total += prod(entry["shape"]) * bits // 8
        return total
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged: loading names what is wrong
        return size


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
