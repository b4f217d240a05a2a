"""Loading a pair to measure it: as a user would, except that what is built only to be measured need not go through the
disk."""

from __future__ import annotations

from typing import Any

import torch

from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.loading import check_widened
from eagle.model.locate import RANDOM_DRAFT, ensure_local, locate, no_head
from eagle.model.presets import find_preset
from eagle.model.widened_folder import widened_folder


def load_for_bench(
    name: str,
    draft: str | None = None,
    dtype: str | None = None,
    *,
    tree: tuple[int, int, int] = (60, 7, 10),
) -> EaModel:
    """`EaModel.from_pretrained` for a measurement.

    dtype: "float32", "bfloat16" or "float16", or None for float32 on a CPU and the checkpoint's own on a GPU. tree:
    total_token, depth, top_k. The built-in widened models are built in GPU memory where there is a GPU and they are not
    on disk yet. Raises InvalidInputError for a model without a tokenizer, and what `EaModel.from_pretrained` raises.
    """
    options: dict[str, Any] = dict(zip(("total_token", "depth", "top_k"), tree, strict=True))
    if dtype is not None:
        options["dtype"] = dtype
    if builds_in_memory(name):
        options["in_memory"] = True
    model = EaModel.from_pretrained(name, ea_model_path=draft, **options)
    if model.get_tokenizer() is None:
        raise InvalidInputError(f"the model {name} has no tokenizer; add tokenizer.json and its config to it")
    return model


def prepare(name: str, draft: str | None = None, dtype: str | None = None) -> None:
    """Bring the weights to this machine, with progress bars; loading in ``dtype`` then needs no network. Raises what
    `locate`, `ensure_local` and `check_widened` raise, and ModelNotFoundError for a target without a head."""
    options = {} if dtype is None else {"dtype": dtype}
    location = locate(
        name,
        draft,
        in_memory=builds_in_memory(name),
        before_build=lambda wide, small: check_widened(wide, small, options),
    )
    if location.draft is None:
        raise no_head(location.base)
    ensure_local(location.base, "target model")
    if location.draft != RANDOM_DRAFT:
        ensure_local(location.draft, "draft head")


def builds_in_memory(name: str) -> bool:
    """Whether a name stands for a widened model that is not on disk, and there is a GPU to build it on."""
    preset = find_preset(name)
    if preset is None or preset.origin != "widened" or not torch.cuda.is_available():
        return False
    return not widened_folder(preset.name).is_dir()
