"""`eagle bench equality`: greedy EAGLE output against plain decoding's."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.console import choose_tree, note
from eagle.commands.measuring import SLOW_ON_CPU, check_counts, dtype_name, headline, open_for_bench
from eagle.commands.options import (
    MODEL_DEFAULT,
    PAPER_TREE,
    TREE_DEFAULT,
    TREE_METAVAR,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    Kernels,
    KernelsOption,
    ModelOption,
    NewTokensOption,
    TargetDtypeOption,
    WeightDtype,
    check_flags,
    parse_tree,
)
from eagle.commands.outputs import check_out, writing
from eagle.commands.reply import encode_prompt, has_template

if TYPE_CHECKING:
    import torch

    from eagle.bench.equality import Equality
    from eagle.engine.settings import Exact

EXACT = {"auto": "auto", True: "on", False: "off"}


def equality(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file as for 'bench accept'.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    max_new_tokens: NewTokensOption = 256,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            "--tree",
            metavar=TREE_METAVAR,
            help=f"Repeatable; auto: the fastest here. Default: {PAPER_TREE}.",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Repeatable. Default: 1.")] = None,
    prefix: Annotated[
        int, typer.Option("--prefix", help="Lengthen each prompt to so many tokens by text before it.")
    ] = 0,
    kernels: KernelsOption = Kernels.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Bit-equal rows whatever the batch and the tree; --no-exact: what is fastest. Default: exact where "
            "that takes at most a tenth of a step; not plain decoding by a target's own modules.",
        ),
    ] = None,
    fused: Annotated[
        bool, typer.Option(help="Llama-like targets through packed weights; --no-fused: their own modules.")
    ] = True,
    dtype: Annotated[list[Dtype] | None, typer.Option("--dtype", help="Repeatable. Default: auto.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A file for the results as JSON.")] = None,
) -> None:
    """Whether EAGLE, for each tree and batch size, writes what plain decoding of each prompt alone writes."""
    from eagle.bench.prompts import read_prompts

    trees = tree or [PAPER_TREE]
    for text in trees:
        check_flags(text, kernels, max_new_tokens)
    for rows in batch or ():
        check_counts(batch=rows)
    if prefix < 0:
        raise typer.BadParameter(f"--prefix is {prefix}; expected at least 0")
    check_out(out)
    chosen = read_prompts(prompts, limit)
    found: list[dict[str, Any]] = []
    exactness = "auto" if exact is None else exact
    settings = {
        "model": model,
        "prefix": prefix,
        "fused": fused,
        "draft_dtype": draft_dtype.value,
        "target_dtype": target_dtype.value,
    }
    for kind in dtype or [Dtype.auto]:
        loaded = open_for_bench(model, draft, trees[0], kind)
        from eagle.bench.equality import compare, lengthened
        from eagle.bench.provenance import clocks, provenance
        from eagle.bench.runs import check_prompts
        from eagle.model.ops import TreeShape
        from eagle.model.triton_kernels import optimize_eagle_with_triton

        if loaded.device.type == "cpu" and not found:  # once, whatever the number of dtypes
            note(SLOW_ON_CPU)
        optimize_eagle_with_triton(
            loaded,
            kernels=kernels.value,
            fused="auto" if fused else "off",
            exact=exactness,
            draft_dtype=draft_dtype.setting,
            target_dtype=target_dtype.setting,
        )
        print(f"{headline(model, loaded, tree=False)}, exact: {EXACT[loaded.engine.exact]}", flush=True)
        tokenizer, raw = loaded.get_tokenizer(), not has_template(loaded.get_tokenizer())
        ids = [encode_prompt(tokenizer, prompt.text, raw=raw) for prompt in chosen]
        if prefix:
            filler = [token for row in ids for token in row]
            ids = [lengthened(row, filler, prefix) for row in ids]
        check_prompts(loaded, ids, [prompt.place for prompt in chosen])
        if TREE_DEFAULT in trees:
            choose_tree(loaded)
        shapes = [
            loaded.tree_shape if text == TREE_DEFAULT and loaded.captures_steps else TreeShape(*parse_tree(text))
            for text in trees
        ]
        name, engine, device = dtype_name(loaded), loaded.engine, loaded.device

        def keep(
            result: Equality, name: str = name, exact: Exact = engine.exact, device: torch.device = device
        ) -> None:
            """Print a result and write the file anew: hours of runs, cut off, leave what they had."""
            print(result, flush=True)
            found.append(settings | {"exact": exact, "dtype": name} | result.to_json())
            if out is not None:
                origin = provenance(device) | {"clocks": clocks(device)}
                with writing(out):
                    out.write_text(
                        json.dumps({"provenance": origin, "results": found}, indent=1) + "\n", encoding="utf-8"
                    )

        compare(loaded, ids, max_new_tokens, shapes, batch or [1], told=keep)
        del loaded
        gc.collect()  # fused weights lie in cycles, and the next dtype's model needs the memory
    if any(row["partings"] for row in found):
        raise typer.Exit(1)
