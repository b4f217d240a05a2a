"""Files that a measurement leaves: refused before it begins where they could not be written."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle.errors import EagleError, InvalidInputError

PLOT_FORMATS = (".png", ".svg", ".pdf")


def check_out(path: Path | None, option: str = "--out", *, folder: bool = False) -> None:
    """Refuse, before anything runs, a file (``folder``: a folder for files) that could not be written. Makes its folder.
    Raises InvalidInputError."""
    if path is None:
        return
    if not folder and path.is_dir():
        raise InvalidInputError(f"{option} is {path}, which is a folder; give a file's name")
    if folder and path.is_file():
        raise InvalidInputError(f"{option} is {path}, which is a file; give a folder's name")
    place = path if folder else path.absolute().parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not folder and path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise InvalidInputError(
            f"{option} is {path}: cannot write to {place} ({error.strerror or error}); give another"
        ) from error


def check_plot(path: Path | None) -> None:
    """`check_out` for a plot, whose name says its format. Raises InvalidInputError."""
    if path is None:
        return
    if path.suffix.lower() not in PLOT_FORMATS:
        raise InvalidInputError(f"--plot is {path}; expected a file that ends in {', '.join(PLOT_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInputError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    check_out(path, "--plot")


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Around what writes ``path`` after all, a full disk say: raises EagleError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise EagleError(f"cannot write to {path} ({error.strerror or error}); give another as {option}") from error
