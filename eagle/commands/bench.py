"""`eagle bench`: measurements. `accept`: the accept length; `generate`: latencies; `roofline` and `sweep`: a step against
its bytes, and trees; `peers`: other engines; `report`: all of it on one page; `kernels` and `tune`: the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from eagle.commands.bench_equality import equality
from eagle.commands.bench_generate import generate
from eagle.commands.bench_kernels import kernels, tune
from eagle.commands.bench_peers import peers
from eagle.commands.bench_report import report
from eagle.commands.bench_roofline import roofline
from eagle.commands.bench_step import step
from eagle.commands.bench_sweep import sweep
from eagle.commands.console import device_name, note, open_model
from eagle.commands.measuring import SLOW_ON_CPU, progress, settings
from eagle.commands.options import (
    MODEL_DEFAULT,
    PAPER_TREE,
    TREE_DEFAULT,
    DraftOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Kernels,
    KernelsOption,
    ModelOption,
    NewTokensOption,
    TreeOption,
    check_flags,
)

app = typer.Typer(help="Measure.", rich_markup_mode=None)
GPU_BATCH = 16


@app.callback(invoke_without_command=True)
def show_help(context: typer.Context) -> None:
    """Measure acceptance, whole generations, steps, trees, other engines and kernels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def accept(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="MT-bench's format, {'prompt': ...} or one prompt a line. Default: own prompts."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    max_new_tokens: NewTokensOption = 256,
    tree: TreeOption = PAPER_TREE,
    kernels: KernelsOption = Kernels.auto,
    dtype: DtypeOption = Dtype.auto,
    batch: Annotated[
        int | None, typer.Option("--batch", help=f"Prompts run together. Default: 1 on a CPU, {GPU_BATCH} on a GPU.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Mean accept length over prompts, greedy, and whether the outputs equal plain decoding's."""
    from eagle.bench.prompts import read_prompts

    if batch is not None and batch <= 0:
        raise typer.BadParameter(f"--batch is {batch}; expected at least 1")
    chosen = read_prompts(prompts, limit)
    check_flags(tree, kernels, max_new_tokens)
    loaded, notes = open_model(model, draft, tree, kernels, dtype)

    from eagle.bench.accept import lines, measure_acceptance
    from eagle.commands.reply import NO_TEMPLATE, encode_prompt, has_template

    tokenizer = loaded.get_tokenizer()
    raw, on_cpu = not has_template(tokenizer), loaded.device.type == "cpu"
    note(*notes, *([NO_TEMPLATE] if raw else []), *([SLOW_ON_CPU] if on_cpu else []))
    if batch is None:
        batch = 1 if on_cpu else GPU_BATCH
    done = 0
    with progress("prompts") as told:
        told("EAGLE and plain", done, len(chosen))

        def advance(count: int) -> None:
            nonlocal done
            done += count
            told("EAGLE and plain", done, len(chosen))

        report = measure_acceptance(
            loaded,
            chosen,
            lambda text: encode_prompt(tokenizer, text, raw=raw),
            max_new_tokens=max_new_tokens,
            batch=batch,
            advance=advance,
        )
    if as_json:
        asked = {"max_new_tokens": max_new_tokens, "batch": batch, "kernels": kernels.value}
        print(json.dumps(settings(model, draft, loaded) | asked | report.as_dict(), ensure_ascii=False))
        return
    for line in lines(report):
        print(line)
    print(f"{loaded.base_model.dtype} on {device_name(loaded.device)}, batch {batch}".removeprefix("torch."))
    if loaded.device.type == "cpu" and tree == PAPER_TREE:
        note(f"tree {PAPER_TREE} is the papers', for their accept length; a CPU is faster with --tree {TREE_DEFAULT}")


app.command()(generate)
app.command()(equality)
app.command()(step)
app.command()(kernels)
app.command()(tune)
app.command()(roofline)
app.command()(sweep)
app.command()(peers)
app.command()(report)
