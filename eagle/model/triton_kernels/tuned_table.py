"""Measured launch configurations as data: one JSON file a GPU, written by `eagle bench tune`, read once by a process.

A file lies in `tuned/` beside this module, named after the device; the environment variable EAGLE_TUNED adds one of the
user's own, which goes before it. A file holds ``{"device": name, "linear": [{"n", "k", "dtype", "weight_dtype",
"norm_after", "config": {…}, measured times}, …]}`` and counts on the device it names. Sizes that a device has no entry for
come from its family's file: GPUs of one architecture, which differ in memory and somewhat in multiprocessors.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eagle.errors import InvalidInputError

FOLDER = Path(__file__).parent / "tuned"
VARIABLE = "EAGLE_TUNED"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
}
FAMILIES = {r"\b(H100|H200|H800|GH200)\b": "NVIDIA H100 80GB HBM3"}
"""Patterns of device names, and the device whose table serves them too: Hopper's 132 (PCIe: 114) multiprocessors."""

FIELDS = {
    "block_n": int,
    "block_k": int,
    "split_k": int,
    "num_warps": int,
    "num_stages": int,
    "swap": bool,
    "tma": bool,
    "prefetch": int,
}
"""Of `linear_config.LinearConfig`; the first two are required."""
REQUIRED = ("block_n", "block_k", "split_k")
POWERS = ("block_n", "block_k", "num_warps")

Key = tuple[int, int, torch.dtype, torch.dtype, bool]


def file_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def shipped(device_name: str) -> list[str]:
    """The devices whose shipped tables serve this one, the nearest last."""
    return [name for name in _relatives(device_name) if (FOLDER / file_name(name)).exists()]


def _relatives(device_name: str) -> list[str]:
    """The device that stands for this one's family, and itself."""
    family = [name for pattern, name in FAMILIES.items() if re.search(pattern, device_name)]
    return list(dict.fromkeys([*family, device_name]))


@cache
def tuned_linears(device_name: str) -> dict[Key, dict[str, int | bool]]:
    """Fields of the linear's configuration by (N, K, dtype of x, of the weight, whether a norm follows);
    empty where nobody measured.

    Raises InvalidInputError for a file that cannot be read as described, and for one that EAGLE_TUNED names and that is
    not there or was measured on another kind of GPU.
    """
    found: dict[Key, dict[str, int | bool]] = {}
    for name in shipped(device_name):
        found |= _entries(FOLDER / file_name(name), name)
    if own := os.environ.get(VARIABLE):
        found |= _entries(Path(own), device_name, *_relatives(device_name))
    return found


def _entries(path: Path, *devices: str) -> dict[Key, dict[str, int | bool]]:
    content = _read(path)
    if content["device"] not in devices:
        raise InvalidInputError(
            f"{path} was measured on {content['device']}, and this is {devices[0]}: unset {VARIABLE}, or run "
            "`eagle bench tune` here"
        )
    return {_key(entry, path): entry["config"] for entry in content["linear"]}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read tuned configurations from {path}: {error}; unset {VARIABLE}?") from None
    if not isinstance(content, dict) or not isinstance(content.get("linear"), list) or "device" not in content:
        raise InvalidInputError(f"{path} holds no tuned configurations; expected what `eagle bench tune` writes")
    return content


def _key(entry: dict[str, Any], path: Path) -> Key:
    try:
        config, sizes = entry["config"], (entry["n"], entry["k"])
        key = (*sizes, DTYPES[entry["dtype"]], DTYPES[entry["weight_dtype"]], entry["norm_after"])
        missing = [name for name in REQUIRED if name not in config]
        wrong = [f"{name}: {value!r}" for name, value in config.items() if not _valid(name, value)]
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"an entry of {path} lacks or misnames {error}; run `eagle bench tune` again") from None
    if not all(type(size) is int and size > 0 for size in sizes):
        raise InvalidInputError(f"an entry of {path} has n and k {sizes}; expected positive whole numbers")
    if missing or wrong:
        found = ", ".join([*wrong, *(f"no {name}" for name in missing)])
        raise InvalidInputError(
            f"an entry of {path} has {found}; expected {', '.join(FIELDS)}, with {', '.join(POWERS)} powers of two: run "
            "`eagle bench tune` again"
        )
    return key


def _valid(name: str, value: Any) -> bool:
    if type(value) is not FIELDS.get(name):
        return False
    if FIELDS[name] is bool:
        return True
    least = 0 if name == "prefetch" else 1
    return value >= least and (name not in POWERS or value.bit_count() == 1)
