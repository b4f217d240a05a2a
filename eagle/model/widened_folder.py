"""The widened models as folders in the user's cache: ``target`` and ``head``, plain Hugging Face folders that other engines
load too. Written shard by shard, beside their final place, and renamed into it whole."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.errors import EagleError, OutOfMemoryError
from eagle.model.embedded import MANIFEST, cache_folder
from eagle.model.embedded import _exclusive as exclusive
from eagle.model.widened import SIZES, Advance, SmallPair, part_bytes, progress_bar, shape_of, widened_draft

if TYPE_CHECKING:
    import torch

    from eagle.model.widening import Part, Widening

FORMAT_VERSION = 1
"""Raised when a build writes something else than before; older folders are then made anew."""
SHARD_BYTES = 1 << 30
"""The most a weight file holds, unless one tensor is larger: what a build keeps in memory."""
_SLACK = 50_000_000
"""Bytes for what is no weight: headers, tokenizer, and a file system's own needs."""
SHARED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Taken over from the small model as they are."""

_CARD = """\
---
library_name: transformers
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {name}

SmolLM2-135M-Instruct{part} in a larger shape, for benchmarks: it computes the same function, at the cost of a model of this
size. Random numbers fill the weights that the function does not use. Made by eagle-triton-kernels.
"""


def widened_folder(name: str) -> Path:
    """Where the preset ``name`` is kept, with ``target`` and ``head`` in it. It may not exist yet."""
    return cache_folder() / "models" / name


def ensure_widened(name: str, small: SmallPair, *, progress: bool = True) -> Path:
    """`widened_folder`, built in bfloat16 if it is missing or was made from another pair.

    A build holds about 2 GB of memory. Two processes at once build once: the second waits. What exists under the final
    name is whole. With ``progress``, a line and a bar are drawn on standard error.

    Raises:
        OutOfMemoryError: not enough disk space; said before anything is written.
        EagleError: the cache folder cannot be written.
    """
    folder = widened_folder(name)
    digest = small.digest()
    if is_complete(folder, name, digest):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, announce=progress):
            # Another process may have finished it while this one waited.
            if not is_complete(folder, name, digest):
                _build(folder, name, small, digest, progress)
    except OSError as error:
        if isinstance(error, EagleError):
            raise
        if error.errno == errno.ENOSPC:
            raise OutOfMemoryError(f"the disk of {folder.parent} is full, so {name} could not be built") from error
        raise EagleError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror or error}); "
            "set EAGLE_CACHE to a folder that can be written"
        ) from error
    return folder


def is_complete(folder: Path, name: str, digest: str) -> bool:
    """Whether ``folder`` holds a whole build of ``name`` from the pair with that digest. Takes milliseconds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["made_of"] == _made_of(name, digest)
            and len(manifest["files"]) > 0
            and all((folder / path).stat().st_size == size for path, size in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # missing, cut short or not ours: it will be made anew


def _made_of(name: str, digest: str) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, "small": digest, "sizes": json.loads(json.dumps(SIZES[name]))}


def _build(folder: Path, name: str, small: SmallPair, digest: str, progress: bool) -> None:
    """Build ``folder``; the caller holds its lock."""
    import torch

    # Whatever else lies here was left by a process that was killed: only the lock's holder builds.
    for stale in folder.parent.glob(f".{name}.*.tmp"):
        shutil.rmtree(stale)
    widening = small.widening(shape_of(name), "cpu", torch.bfloat16)
    parts, head = small.target_parts(widening), small.draft_parts(widening)
    size = sum(part_bytes(part, torch.bfloat16) for part in (*parts, *head))
    free = shutil.disk_usage(folder.parent).free
    if free < size + _SLACK:
        raise OutOfMemoryError(
            f"{name} needs {(size + _SLACK) / 1e9:.1f} GB of disk space in {folder.parent}, {free / 1e9:.1f} GB are free; "
            "free some, set EAGLE_CACHE to a folder on another disk, or build it in memory (in_memory=True)"
        )
    staging = folder.parent / f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        built = staging / "model"
        (built / "target").mkdir(parents=True)
        with progress_bar(progress, name, size, folder) as advance, _full_disk(name, folder.parent):
            _write_target(built / "target", name, small, widening, parts, advance)
            _write_head(built / "head", name, small, widening, head, advance)
        files = {path.relative_to(built).as_posix(): path.stat().st_size for path in sorted(built.rglob("*.*"))}
        manifest = {"made_of": _made_of(name, digest), "files": files}
        (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():  # damaged, or of an older format
            folder.rename(staging / "replaced")
        built.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_target(
    folder: Path, name: str, small: SmallPair, widening: Widening, parts: list[Part], advance: Advance
) -> None:
    from safetensors.torch import save_file

    shards = list(_shards(parts, widening.dtype))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for part in shard:
            tensors[part.name] = part.make()
            weight_map[part.name] = file
            advance(part_bytes(part, widening.dtype))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes 0600: nobody else could use a shared cache
        del tensors  # before the next shard's are made
    total = sum(part_bytes(part, widening.dtype) for part in parts)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", small.wide_config(widening))
    for shared in SHARED_FILES:
        if (small.target / shared).is_file():
            shutil.copyfile(small.target / shared, folder / shared)
    (folder / "README.md").write_text(_CARD.format(name=name, part=""), encoding="utf-8")


def _write_head(
    folder: Path, name: str, small: SmallPair, widening: Widening, parts: list[Part], advance: Advance
) -> None:
    from eagle.model.checkpoints import save_draft

    save_draft(widened_draft(small, widening, parts, advance), folder)
    (folder / "model.safetensors").chmod(0o644)
    card = _CARD.format(name=f"EAGLE-3 head for {name}", part="'s EAGLE-3 head")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _shards(parts: list[Part], dtype: torch.dtype) -> Iterator[list[Part]]:
    """Groups of consecutive parts of at most SHARD_BYTES, or of one part."""
    shard: list[Part] = []
    size = 0
    for part in parts:
        own = part_bytes(part, dtype)
        if shard and size + own > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += own
    yield shard


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _full_disk(name: str, where: Path) -> Iterator[None]:
    """safetensors tells of a full disk in an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error) or "StorageFull" in str(error):
            raise OutOfMemoryError(f"the disk of {where} is full, so {name} could not be built") from error
        raise
