"""From what the user typed to where the target and its draft head are."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import InvalidInputError, ModelNotFoundError
from eagle.model.embedded import ensure_embedded
from eagle.model.hub import check_model_folder, ensure_local, looks_like_hub_id
from eagle.model.presets import DEFAULT_MODEL, PRESETS, Preset, find_preset, heads_for, hint
from eagle.model.widened import SmallPair
from eagle.model.widened_folder import ensure_widened, widened_folder

__all__ = ["RANDOM_DRAFT", "ModelLocation", "ensure_local", "locate", "no_head"]

RANDOM_DRAFT = "random"
"""In place of a head: one made from nothing, right in shape and useless in its guesses."""

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class ModelLocation:
    """Where a pair is. ``base`` and ``draft`` are folders or hub ids; :func:`ensure_local` makes folders of both."""

    base: str
    draft: str | None
    """A folder, a hub id, "random", or None where no head was named."""
    preset: Preset | None = None
    draft_is_untrained: bool = False
    revision: str | None = None
    """Branch, tag or commit of ``base`` on the hub."""
    widen: SmallPair | None = None
    """What the preset is to be built from in memory; ``base`` and ``draft`` then name this pair's folders."""


def locate(
    name_or_path: str | os.PathLike[str] | None = None,
    ea_model_path: str | os.PathLike[str] | None = None,
    *,
    base_model_path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    in_memory: bool = False,
    progress: bool = True,
    before_build: Callable[[str, SmallPair], None] | None = None,
) -> ModelLocation:
    """Resolve a target and a head.

    The target is ``name_or_path`` or ``base_model_path`` (the reference's name for it), or the default model: a preset
    (in any case; write ``./NAME`` for a folder of that name), a model folder, a folder written by ``eagle fetch --out``
    (it brings its head along), or a hub id. ``ea_model_path`` is a folder, a hub id or "random", and goes before the
    preset's head. The embedded and the widened models are made if they are missing, with ``in_memory`` only the former;
    hub ids are not looked up. before_build: called with a widened model's name and the pair it is made from before it is
    built on disk; what it raises ends the call.

    Raises:
        ModelNotFoundError: nothing usable is there; the message names what is missing, or near matches.
        InvalidInputError: two different targets are given, or one to build in memory that is not built.
        DownloadError, OutOfMemoryError, EagleError: see :func:`eagle.model.embedded.ensure_embedded` and
            :func:`eagle.model.widened_folder.ensure_widened`.
    """
    for value in (name_or_path, base_model_path, ea_model_path):
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise InvalidInputError(f"a model is given as {value!r}; expected a name, a folder or a hub id")
    given = [os.fspath(value) for value in (name_or_path, base_model_path) if value is not None]
    if len(set(given)) > 1:
        raise InvalidInputError(f"two targets are given, {given[0]!r} and {given[1]!r}; give one")
    name = given[0] if given else DEFAULT_MODEL
    draft = None if ea_model_path is None else _locate_draft(os.fspath(ea_model_path))

    preset, widen = find_preset(name), None
    if in_memory and (preset is None or preset.origin != "widened"):
        built = " and ".join(known.name for known in PRESETS.values() if known.origin == "widened")
        raise InvalidInputError(
            f"in_memory=True is for models that are built here, {built}, not {name!r}; leave it out"
        )
    if preset is None:
        base, own_draft = _locate_base(name)
    elif preset.origin == "hub":
        base, own_draft = preset.base, preset.draft
    elif preset.origin == "embedded":
        base, own_draft = str(ensure_embedded(progress=progress)), _packaged_head(preset)
    else:
        small = _small_pair(PRESETS[preset.base], progress)
        if in_memory:
            widen, base, own_draft = small, str(small.target), str(small.head)
        else:
            if before_build is not None and not widened_folder(preset.name).exists():
                before_build(preset.name, small)
            folder = ensure_widened(preset.name, small, progress=progress)
            base, own_draft = str(folder / "target"), str(folder / "head")
    draft = own_draft if draft is None else draft
    return ModelLocation(base, draft, preset, draft == RANDOM_DRAFT, revision, widen)


def check_name(name: str) -> None:
    """Raise ModelNotFoundError for a name that leads nowhere. Fetches and builds nothing; a hub id is not asked for."""
    if find_preset(name) is None:
        _locate_base(name)


def no_head(base: str) -> ModelNotFoundError:
    """The error for a target without a head: names the heads known for it."""
    known = " or ".join(preset.draft for preset in heads_for(base)) or "a folder or a hub id"
    return ModelNotFoundError(
        f"no draft head was named for {base}; give {known} as ea_model_path (--draft), or {RANDOM_DRAFT!r} for an "
        "untrained one"
    )


def _locate_base(name: str) -> tuple[str, str | None]:
    """A folder, with its head where ``eagle fetch --out`` has put one beside it, or a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists() and (folder / "target").is_dir():
        head = folder / "head"
        base = check_model_folder(folder / "target", "target")
        return str(base), str(check_model_folder(head, "head")) if head.exists() else None
    if name and (folder.exists() or _is_path(name)):
        return str(check_model_folder(folder, "target")), None
    if looks_like_hub_id(name):
        return name, None
    raise ModelNotFoundError(f"unknown model {name!r}: {hint(name)}")


def _locate_draft(name: str) -> str:
    if name == RANDOM_DRAFT:
        return name
    folder = Path(name).expanduser()
    if name and (folder.exists() or _is_path(name)):
        return str(check_model_folder(folder, "head"))
    if looks_like_hub_id(name):
        return name
    if (preset := find_preset(name)) is not None and preset.origin == "hub":
        return preset.draft
    raise ModelNotFoundError(f"unknown head {name!r}: give a folder, a hub id 'org/name', or {RANDOM_DRAFT!r}")


def _packaged_head(preset: Preset) -> str:
    """The head that ships in the package; "random" in a version that ships none."""
    folder = ASSETS / preset.draft
    return str(check_model_folder(folder, "head")) if folder.exists() else RANDOM_DRAFT


def _small_pair(preset: Preset, progress: bool) -> SmallPair:
    """What the widened models are made from."""
    return SmallPair(ensure_embedded(progress=progress), check_model_folder(ASSETS / preset.draft, "head"))


def _is_path(name: str) -> bool:
    """Whether ``name`` can only be meant as a path: hub ids have one slash and start with neither dot nor tilde."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
