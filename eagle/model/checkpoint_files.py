"""Reading and writing checkpoint folders. What is read comes from strangers: nothing in it is ever executed.

A folder holds ``config.json`` and its weights as ``model.safetensors`` or ``pytorch_model.bin``, whole or sharded with
an ``.index.json``. Files are memory-mapped where their format allows. Writing goes through temporary names: a save that
fails leaves the folder as it was.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import pickletools
import re
import struct
import tempfile
import warnings
from pathlib import Path
from reprlib import repr as shown  # one short line, whatever the value
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eagle.errors import CheckpointError, ModelNotFoundError, OutOfMemoryError

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
WEIGHT_FILES = (SAFETENSORS_FILE, SAFETENSORS_FILE + ".index.json", PICKLE_FILE, PICKLE_FILE + ".index.json")

# torch's restricted unpickler reports everything as UnpicklingError; these of its messages mean that the file asks for
# a function or class, the others that its bytes make no sense.
_WANTS_CODE = re.compile(
    r"unsupported (global|class)|not an allowed global|trying to call|can only (create|build)", re.IGNORECASE
)
_LFS_POINTER = b"version https://git-lfs"


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of ``folder`` as a dict.

    Raises:
        ModelNotFoundError: there is no such folder, or no ``config.json`` in it.
        CheckpointError: the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{folder} is not a folder: give one that holds {CONFIG_FILE} and {SAFETENSORS_FILE} or {PICKLE_FILE}"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} has no {CONFIG_FILE}: download the checkpoint again, with all its files")
    return _read_json(path)


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of ``folder``, by their stored names, on the CPU in their stored dtypes.

    Raises:
        ModelNotFoundError: the folder holds no weights.
        CheckpointError: a file is truncated, corrupt, not a table of plain tensors, or wants to run code.
    """
    folder = Path(folder)
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ModelNotFoundError(
            f"{folder} has no weights: expected {SAFETENSORS_FILE} or {PICKLE_FILE} (or their .index.json with shards)"
        )
    if found.name.endswith(".index.json"):
        return _read_shards(found)
    return _read_file(found)


def write_checkpoint(folder: str | Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors``, each whole or not at all; the folder is made if need be.

    The files replace older ones by renaming, so tensors still mapped from a file that is overwritten stay valid.

    Raises:
        OutOfMemoryError: there is no room on the disk.
    """
    folder = Path(folder)
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses two names for one storage, which tied weights are.
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            weights, settings = Path(scratch, SAFETENSORS_FILE), Path(scratch, CONFIG_FILE)
            save_file(plain, weights, metadata={"format": "pt"})
            settings.write_text(text, encoding="utf-8")
            os.replace(weights, folder / SAFETENSORS_FILE)
            os.replace(settings, folder / CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        # safetensors gives the system's error number in its text only
        if getattr(error, "errno", None) != errno.ENOSPC and f"os error {errno.ENOSPC}" not in str(error):
            raise
        size = sum(tensor.nbytes for tensor in plain.values())
        raise OutOfMemoryError(f"{folder} has no room for {size:,} bytes: free disk space or save elsewhere") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({_one_line(error)}): download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object: download it again")
    return content


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names: download it again")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if name != Path(name).name or not name.endswith((".safetensors", ".bin")):
            raise CheckpointError(
                f"{index} names the shard {shown(name)}: expected a .safetensors or .bin file beside it"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {shown(name)}, which is missing: download it again")
        tensors.update(_read_file(index.parent / name))
    if lost := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(f"{index} lists {listed(lost)}, in none of its shards: download the checkpoint again")
    return tensors


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull in its repository")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, start)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt ({_one_line(error)}): download or save it again"
        ) from error


def _read_pickle(path: Path, start: bytes) -> dict[str, torch.Tensor]:
    zipped = start.startswith(b"PK\x03\x04")  # torch's own test of the two formats; only this one can be mapped
    try:
        with warnings.catch_warnings():  # about odd content, which is then refused in one line of our own
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if _WANTS_CODE.search(_one_line(error, most=10_000)) or (not zipped and _names_functions(path)):
            raise CheckpointError(
                f"{path} wants to run code when it is loaded and was refused: convert it to safetensors "
                "on a machine where you trust it"
            ) from error
        raise _damaged(path, error) from error
    # Damaged bytes drive torch's reader into whatever operation they happen to spell; these are its ways to fail.
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        EOFError,
        OSError,
        struct.error,
    ) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors: save a state_dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} holds {shown(name)} of type {type(value).__name__}, expected named tensors only: save a state_dict"
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {shown(name)} is not a plain dense tensor: save a state_dict of dense tensors"
            )
    return {name: value.detach() for name, value in content.items()}


def _names_functions(path: Path) -> bool:
    """Whether a bare pickle asks for a function or class that plain tensors don't need; it is read, never executed.

    torch's unpickler stops at the first opcode of a protocol newer than its own, before it sees what is asked for.
    """
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                    return True
                if opcode.name == "GLOBAL" and str(argument).split(" ")[0] not in (
                    "torch",
                    "torch._utils",
                    "collections",
                ):
                    return True
    except (ValueError, LookupError, OSError, OverflowError, MemoryError, struct.error):  # a length can lie
        return False
    return False


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or corrupt ({_one_line(error)}): download or save it again")


def listed(names: list[str], most: int = 8) -> str:
    """The names for an error message: the first ``most`` of them and how many more there are.

    Names are a stranger's text too: one that would break the line, steer a terminal or fill the screen is quoted.
    """
    more = len(names) - most
    tame = [name if name.isprintable() and len(name) <= 100 else shown(name) for name in names[:most]]
    return ", ".join(tame) + (f" and {more} more" if more > 0 else "")


def _one_line(error: BaseException, most: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(char if char.isprintable() else "?" for char in text)
    # torch wraps its reason in advice to load without the restriction, which nobody should be told here.
    text = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation of torch.load")[0]
    return text if len(text) <= most else text[: most - 1] + "…"
