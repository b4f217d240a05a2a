"""Model folders: what makes one usable, and how a hub id becomes one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle.errors import DownloadError, ModelNotFoundError, OutOfMemoryError
from eagle.model.presets import near_matches

# Weights come in one format at a time; code, images and duplicate weights in other layouts are left on the hub.
_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_LEFT_OUT = ["*/*", "consolidated*", "optimizer*", "scheduler*", "training_args*", "rng_state*"]


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``organisation/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def check_model_folder(folder: Path, what: str = "model") -> Path:
    """Return ``folder`` if it holds a config.json and all of its weights; ``what`` names it in the error.

    Raises:
        ModelNotFoundError: naming what is missing.
    """
    expected = "expected a Hugging Face folder: config.json and model*.safetensors or pytorch_model*.bin"
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "is not there"
        raise ModelNotFoundError(f"the {what} folder {folder} {problem}; {expected}")
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"the {what} folder {folder} has no config.json; {expected}")
    if not has_weights(folder):
        raise ModelNotFoundError(f"the {what} folder {folder} has no weights; {expected}")
    # A repository with both formats brings both lists, and the weights of one of them.
    suffix = "safetensors" if any(folder.glob("*.safetensors")) else "bin"
    for index in sorted(folder.glob(f"*.{suffix}.index.json")):
        if missing := _missing_shards(index):
            raise ModelNotFoundError(
                f"the {what} folder {folder} lacks {len(missing)} of the files that {index.name} lists "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); copy or download them again"
            )
    return folder


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` holds weights in a format that can be loaded."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def ensure_local(
    hub_id_or_path: str | os.PathLike[str],
    what: str = "model",
    *,
    revision: str | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    **hub_options: Any,
) -> Path:
    """The folder of a model: an existing one as it is, a hub id downloaded into Hugging Face's own cache.

    Only weights (safetensors; .bin where there are none), JSON and tokenizer files are downloaded; code only with
    ``trust_remote_code``. hub_options: ``token``, ``cache_dir`` and the like, for huggingface_hub's snapshot_download.

    Raises:
        ModelNotFoundError: no such folder, repository or revision, or one that needs permission.
        DownloadError: the hub is out of reach; says what to do offline.
        OutOfMemoryError: no disk space.
    """
    given = os.fspath(hub_id_or_path)
    folder = Path(given).expanduser()
    if folder.exists() or not looks_like_hub_id(given):
        return check_model_folder(folder, what)

    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        # The base class of its HTTP client's errors: httpx or httpx2, as the version of huggingface_hub has it.
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(patterns: list[str]) -> Path:
        wanted = [*patterns, *(["*.py"] if trust_remote_code else [])]
        return Path(
            snapshot_download(given, revision=revision, allow_patterns=wanted, ignore_patterns=_LEFT_OUT, **hub_options)
        )

    try:
        with _hub_bars(progress):
            folder = snapshot([*_CONFIG_FILES, "*.safetensors"])
            if not has_weights(folder):
                folder = snapshot([*_CONFIG_FILES, "pytorch_model*.bin"])
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the {what} {given!r} is gated: accept its terms at {constants.ENDPOINT}/{given}, then run 'hf auth login'"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        close = near_matches(given)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelNotFoundError(
            f"the {what} {given!r} is neither a folder here nor a model on the hub that you may read{meant}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the {what} {given!r} has no revision {revision!r} on the hub") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OutOfMemoryError(
                f"no disk space left in {constants.HF_HUB_CACHE} for the {what} {given!r}; "
                "free some, or set HF_HUB_CACHE to a folder on another disk"
            ) from error
        # The libraries' messages run on with advice of their own: keep the first sentence.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        cure = (
            "HF_HUB_OFFLINE is set: unset it once to fetch it"
            if constants.HF_HUB_OFFLINE
            else "Offline: run 'eagle fetch' where there is a network, and set HF_HUB_OFFLINE=1"
        )
        raise DownloadError(
            f"could not fetch the {what} {given!r} from {constants.ENDPOINT} ({reason}). {cure}, or pass a local folder"
        ) from error
    return check_model_folder(folder, what)


@contextlib.contextmanager
def _hub_bars(enabled: bool) -> Iterator[None]:
    """Hide the hub's progress bars where not ``enabled``; its switch is global, so it is put back."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if enabled or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _missing_shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"{index} is no list of weight files ({error}); download it again") from error
    return sorted(name for name in names if not (index.parent / name).is_file())
