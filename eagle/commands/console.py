"""What every sub-command does around its work: quiet libraries, notes on standard error, loading a pair."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

from eagle.commands.options import TREE_DEFAULT, Dtype, Kernels, WeightDtype, check_kernels, parse_tree
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from eagle.model.ea_model import EaModel
    from eagle.model.locate import ModelLocation

OWN_MODULES = "by this target's own modules"
NEAR_TIES = (
    "in 16 bits a library's sums depend on how many rows are computed together, so a near-tie between two tokens may fall "
    "either way {where}; --dtype float32 decides"
)
"""Why outputs may part where a library multiplies. ``where``: `OWN_MODULES`, or "as loaded"."""

TREE_PROMPTS = 4
"""Own prompts a tree is measured on."""


def note(*texts: str) -> None:
    """A line each for the user on standard error."""
    for text in texts:
        print(f"note: {text}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Turn off the chatter of transformers and tokenizers by their own settings; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\.")


def open_model(
    model: str,
    draft: str | None,
    tree: str,
    kernels: Kernels,
    dtype: Dtype = Dtype.auto,
    draft_dtype: WeightDtype = WeightDtype.same,
    target_dtype: WeightDtype = WeightDtype.same,
) -> tuple[EaModel, list[str]]:
    """Load a target and its head. → the model, and notes for the user, to be shown once nothing can be refused.

    Raises InvalidInputError for a bad ``tree`` or ``kernels`` and for a model without a tokenizer, and whatever
    `EaModel.from_pretrained` raises.
    """
    total_token, depth, top_k = parse_tree(tree)
    check_kernels(kernels)
    from eagle.model.loading import check_widened
    from eagle.model.locate import RANDOM_DRAFT, ensure_local, locate, no_head

    options = {} if dtype is Dtype.auto else {"dtype": dtype.value}
    # Fetched before the libraries are quiet and the spinner turns: a first use draws bars of its own.
    location = locate(model, draft, before_build=lambda name, small: check_widened(name, small, options))
    if location.draft is None:
        raise no_head(location.base)
    ensure_local(location.base, "target model")
    if location.draft != RANDOM_DRAFT:
        ensure_local(location.draft, "draft head")
    quiet_libraries()
    from rich.console import Console

    from eagle.model.ea_model import EaModel
    from eagle.model.triton_kernels import optimize_eagle_with_triton

    with Console(stderr=True).status(f"Loading {model}"):
        loaded = EaModel.from_pretrained(
            model, ea_model_path=draft, total_token=total_token, depth=depth, top_k=top_k, **options
        )
    if loaded.get_tokenizer() is None:
        raise InvalidInputError(f"the model {location.base} has no tokenizer; add tokenizer.json and its config to it")
    loaded.told = lambda line: note(line)
    optimize_eagle_with_triton(
        loaded, kernels=kernels.value, draft_dtype=draft_dtype.setting, target_dtype=target_dtype.setting
    )
    if tree == TREE_DEFAULT:
        choose_tree(loaded)
    return loaded, draft_lines(loaded, location)


def choose_tree(model: EaModel) -> None:
    """Set the tree that is fastest here: measured once for a model, head and GPU, then remembered. Where steps are not
    captured, which makes measuring slow and trees alike, the model's tree stays."""
    from rich.console import Console

    from eagle.bench.prompts import read_prompts
    from eagle.commands.reply import encode_prompt, has_template
    from eagle.engine.tree_choice import choice_key, measure_trees, remember, remembered
    from eagle.model.embedded import cache_folder

    if not model.captures_steps:
        return
    key = choice_key(model)
    try:
        shape = remembered(cache_folder(), key)
    except OSError as error:
        shape = None
        note(f"the tree measured earlier can't be read ({error}); measuring again")
    if shape is None:
        tokenizer = model.get_tokenizer()
        texts = [prompt.text for prompt in read_prompts()][:: 24 // TREE_PROMPTS]
        rows = [encode_prompt(tokenizer, text, raw=not has_template(tokenizer)) for text in texts]
        told, model.told = model.told, None
        try:
            with Console(stderr=True).status("Measuring draft trees, once for this model and GPU") as status:
                found = measure_trees(model, rows, told=lambda figures: status.update(f"Measuring trees: {figures}"))
        finally:
            model.told = told
        shape = found[0].shape
        try:
            remember(cache_folder(), key, shape)
            note(f"fastest draft tree here: {found[0]}; remembered")
        except OSError as error:
            note(f"fastest draft tree here: {found[0]}; it can't be remembered ({error}): set EAGLE_CACHE to a folder")
    model.set_tree(shape.total_token, shape.depth, shape.top_k)


def draft_lines(model: EaModel, location: ModelLocation) -> list[str]:
    """What the user should know about the head: that it is untrained, or how a checkpoint from elsewhere was read."""
    if location.draft_is_untrained or any("untrained" in line for line in model.draft_notes):
        return ["the draft head is untrained: the output is exact, but it comes no sooner than by plain decoding"]
    if location.preset is not None and location.preset.origin != "hub":
        return []
    return ["draft head: " + "; ".join(model.draft_notes)] if model.draft_notes else []


def device_name(device: torch.device) -> str:
    """The device in words a reader of figures can use."""
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({torch.get_num_threads()} threads)"
    )
