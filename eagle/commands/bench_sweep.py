"""`eagle bench sweep`: draft trees at several prefix lengths and batch sizes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from eagle.commands.bench_generate import BUILT_IN
from eagle.commands.console import note
from eagle.commands.measuring import (
    NO_GPU,
    aligned,
    check_counts,
    headline,
    is_raw,
    open_for_bench,
    progress,
    settings,
)
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    TREE_METAVAR,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Kernels,
    KernelsOption,
    ModelOption,
    TargetDtypeOption,
    WeightDtype,
    check_flags,
    parse_tree,
)
from eagle.commands.reply import encode_prompt
from eagle.errors import InvalidInputError


def sweep(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    trees: Annotated[
        list[str] | None,
        typer.Option("--tree", metavar=TREE_METAVAR, help="May be repeated. Default: eight, from 60,7,10 to 5,3,1."),
    ] = None,
    prefixes: Annotated[
        list[int] | None,
        typer.Option("--prefix", help="Tokens before the reply; may be repeated. Default: 128, 1024, 4096."),
    ] = None,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", help="Prompts run together; may be repeated. Default: 1, 4, 16."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="After each prefix. Default: 64.")
    ] = None,
    kernels: KernelsOption = Kernels.auto,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    quick: Annotated[
        bool, typer.Option("--quick", help="3 trees, prefix 128, batch 1, 24 new tokens, unless said otherwise.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Milliseconds a step, accept length and tokens/s of each draft tree, and the fastest for each prefix and batch."""
    check_counts(max_new_tokens=max_new_tokens)
    for count in prefixes or ():
        check_counts(prefix=count)
    for count in batches or ():
        check_counts(batch=count)
    for tree in trees or ():
        check_flags(tree, kernels, 1)
        if parse_tree(tree)[0] == -1:
            raise InvalidInputError(
                f"--tree is {tree}; a sweep measures trees you name: TOTAL,DEPTH,TOPK, as in 60,7,10"
            )
    check_flags(TREE_DEFAULT, kernels, 1)
    loaded = open_for_bench(model, draft, TREE_DEFAULT, dtype)

    from eagle.bench.prompts import read_prompts
    from eagle.bench.report_tables import sweep_section
    from eagle.bench.sweep import QUICK, Grid, measure_sweep
    from eagle.model.ops import TreeShape
    from eagle.model.triton_kernels import optimize_eagle_with_triton

    usual = QUICK if quick else Grid()
    grid = Grid(
        trees=tuple(TreeShape(*parse_tree(tree)) for tree in trees) if trees else usual.trees,
        prefixes=tuple(prefixes or usual.prefixes),
        batches=tuple(batches or usual.batches),
        new_tokens=max_new_tokens or usual.new_tokens,
        prompts=usual.prompts,
    )
    optimize_eagle_with_triton(
        loaded, kernels=kernels.value, draft_dtype=draft_dtype.setting, target_dtype=target_dtype.setting
    )
    if loaded.device.type != "cuda":
        note(NO_GPU)
    context = loaded.target.context_length
    if all(prefix + grid.new_tokens > context for prefix in grid.prefixes):
        raise InvalidInputError(
            f"--prefix is {', '.join(map(str, grid.prefixes))}: with {grid.new_tokens} new tokens each is beyond the "
            f"model's context of {context}; give a shorter one"
        )
    tokenizer, raw = loaded.get_tokenizer(), is_raw(loaded)
    texts = [prompt.text for prompt in read_prompts()]
    with progress("trees") as told:
        cells = measure_sweep(loaded, lambda text: encode_prompt(tokenizer, text, raw=raw), texts, grid, told=told)
    values = settings(model, draft, loaded) | {
        "prompts": BUILT_IN,
        "new_tokens": grid.new_tokens,
        "kernels": kernels.value,
        "draft_dtype": draft_dtype.value,
        "target_dtype": target_dtype.value,
        "cells": [cell.to_json() for cell in cells],
    }
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
        return
    section = sweep_section(model, values)
    print(headline(model, loaded).replace(f", tree {'/'.join(map(str, values['tree']))}", ""))
    for line in ("", *aligned(section.head, section.rows), "", *section.notes):
        print(line)
