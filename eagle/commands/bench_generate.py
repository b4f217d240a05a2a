"""`eagle bench generate`: a set of prompts by EAGLE and plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.console import choose_tree, note
from eagle.commands.measuring import (
    NO_GPU,
    aligned,
    check_counts,
    headline,
    is_raw,
    kernels_line,
    open_for_bench,
    progress,
    settings,
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
    KernelsOption,
    ModelOption,
    NewTokensOption,
    TargetDtypeOption,
    TreeOption,
    WeightDtype,
    check_flags,
)
from eagle.commands.outputs import check_out, writing
from eagle.commands.reply import encode_prompt

if TYPE_CHECKING:
    from eagle.bench.generate import GenerateReport

BUILT_IN = "built-in"
QUICK_PROMPTS = 4
QUICK_TOKENS = 32
METHOD = (
    "Tokens/s count prefill. A token's time is an even part of its step's; the first token is counted apart. Each way was "
    "warmed up by a run that is not counted."
)


def generate(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    prompts: Annotated[
        str,
        typer.Option("--prompts", help="A file as for 'bench accept', or built-in: 24 prompts of the package's own."),
    ] = BUILT_IN,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    max_new_tokens: NewTokensOption = 128,
    batch: Annotated[int, typer.Option("--batch", help="Prompts run together.")] = 1,
    num_runs: Annotated[int, typer.Option("--num-runs", help="Times that each prompt runs.")] = 1,
    kernels: KernelsOption = Kernels.auto,
    tree: TreeOption = TREE_DEFAULT,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_PROMPTS} of the prompts, at most {QUICK_TOKENS} new tokens.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for generate.json and generate.md.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Latencies, tokens/s and accept length over prompts, greedy, with EAGLE and plainly."""
    from eagle.bench.prompts import read_prompts

    check_counts(batch=batch, num_runs=num_runs)
    check_flags(tree, kernels, max_new_tokens)
    check_out(out, folder=True)
    chosen = read_prompts(None if prompts == BUILT_IN else Path(prompts), limit)
    if quick:
        # Spread over the set, whose prompts are ordered by kind.
        chosen = chosen[:: max(1, len(chosen) // QUICK_PROMPTS)][:QUICK_PROMPTS]
        max_new_tokens = min(max_new_tokens, QUICK_TOKENS)
    loaded = open_for_bench(model, draft, tree, dtype)

    from eagle.bench.generate import measure_prompts
    from eagle.bench.runs import check_prompts
    from eagle.model.triton_kernels import optimize_eagle_with_triton

    optimize_eagle_with_triton(
        loaded, kernels=kernels.value, draft_dtype=draft_dtype.setting, target_dtype=target_dtype.setting
    )
    if tree == TREE_DEFAULT:
        choose_tree(loaded)
    tokenizer, raw = loaded.get_tokenizer(), is_raw(loaded)
    ids = [encode_prompt(tokenizer, prompt.text, raw=raw) for prompt in chosen]
    check_prompts(loaded, ids, [prompt.place for prompt in chosen])
    if loaded.device.type != "cuda":
        note(NO_GPU)
    with progress() as told:
        report = measure_prompts(loaded, ids, max_new_tokens, repeats=num_runs, batch=batch, told=told)
    asked = {
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "batch": batch,
        "num_runs": num_runs,
        "kernels": kernels.value,
        "draft_dtype": draft_dtype.value,
        "target_dtype": target_dtype.value,
    }
    values = settings(model, draft, loaded) | asked | report.to_json()
    heading = [
        headline(model, loaded),
        f"{len(ids)} prompts, at most {max_new_tokens} new tokens each, batch {batch}, {num_runs} run(s) each, greedy",
        kernels_line(loaded),
    ]
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        from eagle.bench.generate import closing_lines, rows

        for line in (*heading, "", *aligned(("", "EAGLE", "plain"), list(rows(report))), "", *closing_lines(report)):
            print(line)
    if out is not None:
        _write(out, values, heading, report)
        note(f"wrote {out / 'generate.json'} and {out / 'generate.md'}")


def _write(folder: Path, values: dict[str, Any], heading: list[str], report: GenerateReport) -> None:
    from eagle.bench.generate import closing_lines, rows

    table = ["| | EAGLE | plain |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows(report))]
    marked = [] if values["gpu"] else ["", f"**{NO_GPU[0].upper()}{NO_GPU[1:]}.**"]
    facts = [f"- {line}" for line in (f"`{values['provenance']['command']}`", *heading)]
    text = "\n".join(
        ["# Generation", "", *facts, *marked, "", *table, "", METHOD, "", "```", *closing_lines(report), "```", ""]
    )
    with writing(folder):
        (folder / "generate.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "generate.md").write_text(text, encoding="utf-8")
