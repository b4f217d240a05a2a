"""Measured launch configurations as data: one JSON file a GPU, written by `eagle bench tune`, read once by a process.

A file lies in `tuned/` beside this module, named after the device; the environment variable EAGLE_TUNED adds one of the
user's own, which goes before it. A file holds ``{"device": name, "linear": [{"n", "k", "dtype", "weight_dtype",
"norm_after", "config": {…}, measured times}, …]}`` and counts on the device it names. A device without a file of its own
takes that of its family: GPUs of one architecture, which differ in memory and somewhat in multiprocessors.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"
VARIABLE = "EAGLE_TUNED"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
}
FAMILIES = {r"\b(H100|H200|H800|GH200)\b": "NVIDIA H100 80GB HBM3"}
"""Patterns of device names, and the device whose table serves them: Hopper's 132 (PCIe: 114) multiprocessors."""

Key = tuple[int, int, torch.dtype, torch.dtype, bool]


def file_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def relative(device_name: str) -> str:
    """The device whose shipped table serves this one: itself, or its family's where it has none."""
    if (FOLDER / file_name(device_name)).exists():
        return device_name
    return next((name for pattern, name in FAMILIES.items() if re.search(pattern, device_name)), device_name)


@cache
def tuned_linears(device_name: str) -> dict[Key, dict[str, int | bool]]:
    """Fields of the linear's configuration by (N, K, dtype of x, of the weight, whether a norm follows);
    empty where nobody measured.

    Raises ValueError for a file that cannot be read as described, or that EAGLE_TUNED names and is not there.
    """
    shipped = relative(device_name)
    path = FOLDER / file_name(shipped)
    found = _entries(path, shipped) if path.exists() else {}
    if own := os.environ.get(VARIABLE):
        found |= _entries(Path(own), device_name)
    return found


def _entries(path: Path, device_name: str) -> dict[Key, dict[str, int | bool]]:
    content = _read(path)
    if content["device"] != device_name:
        return {}
    return {_key(entry, path): entry["config"] for entry in content["linear"]}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read tuned configurations from {path}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("linear"), list) or "device" not in content:
        raise ValueError(f"{path} holds no tuned configurations; expected what `eagle bench tune` writes")
    return content


def _key(entry: dict[str, Any], path: Path) -> Key:
    try:
        config = entry["config"]
        sizes = (config["block_n"], config["block_k"], config["split_k"], entry["n"], entry["k"])
        whole = all(type(size) is int and size > 0 for size in sizes)
        key = (entry["n"], entry["k"], DTYPES[entry["dtype"]], DTYPES[entry["weight_dtype"]], entry["norm_after"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"an entry of {path} lacks or misnames {error}; run `eagle bench tune` again") from None
    if not whole:
        raise ValueError(f"an entry of {path} has sizes {sizes}; expected positive whole numbers")
    return key
