"""Getting weights ahead of time: into the caches, or as plain folders that can be carried to another machine."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from eagle.errors import EagleError, InvalidInputError, OutOfMemoryError
from eagle.model.embedded import MANIFEST
from eagle.model.locate import RANDOM_DRAFT, ensure_local, locate
from eagle.model.portable_head import portable_head

_LINK_FROM_BYTES = 10_000_000


def fetch(
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    ea_model_path: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Bring a model and its head to this machine; later runs need no network.

    Without ``out`` they stay in the caches. With it, ``out/target`` and ``out/head`` become plain Hugging Face folders
    (large files are hard links into the cache where the disk allows it), and ``out`` itself is a name for the pair. The
    shipped head, which leaves its output matrix to the target, gets one of its own there: other engines need it.

    → the target's folder and, where there is a head, the head's.

    Raises:
        ModelNotFoundError, DownloadError, OutOfMemoryError: as :func:`~eagle.model.locate.locate` and ``ensure_local``;
            the last also where the disk of ``out`` has no room for what must be copied.
        InvalidInputError: ``out`` holds a model already.
        EagleError: ``out`` cannot be written.
    """
    parts = ("target", "head")
    if out is not None:
        out = Path(out).expanduser()
        for part in parts:
            if (out / part).exists():
                raise InvalidInputError(f"{out / part} exists already; give a new folder, or remove it first")
        _check_writable(out)
    location = locate(name, ea_model_path, revision=revision, progress=progress)
    folders = [ensure_local(location.base, "target", revision=location.revision, progress=progress)]
    if location.draft not in (None, RANDOM_DRAFT):
        folders.append(ensure_local(location.draft, "head", progress=progress))
    if out is None:
        return folders
    shipped = location.preset is not None and location.preset.origin == "embedded" and ea_model_path is None
    with tempfile.TemporaryDirectory(dir=_existing_parent(out)) as scratch:
        if shipped and len(folders) == 2:
            folders[1], _ = portable_head(folders[0], folders[1], Path(scratch, "head"))
        _check_space(folders, out)
        return [_place(source, out / part) for source, part in zip(folders, parts, strict=False)]


def _check_writable(out: Path) -> None:
    """Find out before anything is fetched. Raises EagleError."""
    try:
        tempfile.TemporaryDirectory(dir=_existing_parent(out)).cleanup()
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(place: Path, error: OSError) -> EagleError:
    return EagleError(f"cannot write {place} ({error.strerror or error}); give a folder that can be written")


def _check_space(folders: list[Path], out: Path) -> None:
    """Refuse to copy what the disk of ``out`` has no room for. Raises OutOfMemoryError."""
    place = _existing_parent(out)
    disk, needed = place.stat().st_dev, 0
    for path in (path.resolve() for folder in folders for path in folder.iterdir() if path.name != MANIFEST):
        if path.is_file() and not ((entry := path.stat()).st_dev == disk and entry.st_size >= _LINK_FROM_BYTES):
            needed += entry.st_size
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutOfMemoryError(
            f"{out} takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk; free some, or give a folder on "
            "another disk"
        )


def _existing_parent(folder: Path) -> Path:
    """The nearest folder above that exists: on the same disk, mostly."""
    return next(parent for parent in folder.absolute().parents if parent.is_dir())


def _place(source: Path, destination: Path) -> Path:
    """Copy or link the files of ``source`` (a flat folder) to ``destination``, which appears only once it is whole."""
    staging = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            real = path.resolve()  # the hub's cache holds links to its blobs
            if real.is_file() and path.name != MANIFEST:
                _link_or_copy(real, staging / path.name)
        staging.rename(destination)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutOfMemoryError(
                f"no disk space left for {destination} ({shutil.disk_usage(staging.parent).free / 1e6:.0f} MB free)"
            ) from error
        raise _unwritable(destination, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return destination


def _link_or_copy(source: Path, destination: Path) -> None:
    # Small files are copied: an edited config must not change the cache.
    if source.stat().st_size >= _LINK_FROM_BYTES:
        try:
            os.link(source, destination)
        except OSError:  # another disk, or one without hard links
            pass
        else:
            return
    shutil.copyfile(source, destination)
