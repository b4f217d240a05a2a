"""`eagle bench roofline`: how near a step comes to the time its bytes take."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from eagle.commands.console import note
from eagle.commands.measuring import (
    NO_GPU,
    aligned,
    check_counts,
    is_raw,
    open_for_bench,
    progress,
    settings,
    settle_tree,
)
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Kernels,
    TargetDtypeOption,
    TreeOption,
    WeightDtype,
    check_flags,
)
from eagle.commands.reply import encode_prompt
from eagle.errors import EagleError

PROMPTS, NEW_TOKENS = 4, 64
QUICK_PROMPTS, QUICK_TOKENS = 1, 32
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", "-m", help=f"May be repeated. Default: {MODEL_DEFAULT}.")
]


def roofline(
    model: ModelsOption = None,
    draft: DraftOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help=f"Built-in prompts. Default: {PROMPTS}.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help=f"Default: {NEW_TOKENS}.")
    ] = None,
    tree: TreeOption = TREE_DEFAULT,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_PROMPTS} prompt, {QUICK_TOKENS} new tokens, unless said otherwise.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Milliseconds a step against the floor: the bytes it must read at the measured bandwidth."""
    check_counts(limit=limit, max_new_tokens=max_new_tokens)
    tokens = max_new_tokens or (QUICK_TOKENS if quick else NEW_TOKENS)
    count = limit or (QUICK_PROMPTS if quick else PROMPTS)
    check_flags(tree, Kernels.auto, tokens)
    weights = {"draft_dtype": draft_dtype, "target_dtype": target_dtype}
    found, failed = [], False
    from eagle.model.locate import check_name

    for name in model or ():
        check_name(name)
    for name in model or [MODEL_DEFAULT]:
        try:
            values = _measure(name, draft, tree, dtype, weights, count, tokens)
        except EagleError as error:
            if len(model or ()) < 2:
                raise
            failed, values = True, {"model": name, "error": str(error)}
            note(f"{name}: {error}")
        free_memory()
        found.append(values)
        if not as_json and "error" not in values:
            _show(values)
    if as_json:
        print(json.dumps({"models": found}, ensure_ascii=False))
    if failed:
        raise typer.Exit(2)


def _measure(
    name: str, draft: str | None, tree: str, dtype: Dtype, weights: dict[str, WeightDtype], count: int, tokens: int
) -> dict[str, Any]:
    loaded = open_for_bench(name, draft, tree, dtype)

    from eagle.bench.prompts import read_prompts
    from eagle.bench.read_speed import read_gb_s
    from eagle.bench.roofline import measure_roofline

    if loaded.device.type != "cuda":
        note(NO_GPU)
    tokenizer, raw = loaded.get_tokenizer(), is_raw(loaded)
    prompts = read_prompts()
    chosen = prompts[:: max(1, len(prompts) // count)][:count]
    ids = [encode_prompt(tokenizer, prompt.text, raw=raw) for prompt in chosen]
    options = {kind: given.setting for kind, given in weights.items()}
    settle_tree(loaded, tree, options)
    with progress() as told:
        result = measure_roofline(loaded, ids, tokens, read_gb_s(loaded.device), options=options, told=told)
    asked = {"max_new_tokens": tokens} | {kind: given.value for kind, given in weights.items()}
    return settings(name, draft, loaded) | asked | result.to_json()


def free_memory() -> None:
    """Give the memory of models that are no longer referred to back to the device, for the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(values: dict[str, Any]) -> None:
    from eagle.bench.report_tables import roofline_section

    section = roofline_section(values["model"], values)
    print(f"{section.title}, on {values['device']}")
    for line in ("", *aligned(section.head, section.rows), "", *section.notes, ""):
        print(line)
