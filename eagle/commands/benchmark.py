"""`benchmark.py`: one prompt, EAGLE and plain decoding, each as loaded and after `optimize_eagle_with_triton`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eagle.commands.console import NEAR_TIES, OWN_MODULES, device_name, note
from eagle.commands.measuring import (
    NO_GPU,
    aligned,
    check_counts,
    headline,
    is_raw,
    open_for_bench,
    progress,
    room_for_steps,
    settings,
    settle_tree,
)
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    DraftOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Kernels,
    ModelOption,
    TreeOption,
    check_flags,
)
from eagle.commands.outputs import check_plot
from eagle.commands.reply import check_text, encode_prompt

if TYPE_CHECKING:
    from eagle.bench.compare import Comparison, Way

PROMPT = "Explain in a few sentences why the sky is blue at noon and red at sunset."
HEAD = ("", "time, s: min", "median", "max", "tokens/s", "ms/step", "accept length", "GB/s", "of measured")

PromptOption = Annotated[str, typer.Option("--prompt", help="What the model is asked.")]
MaxLengthOption = Annotated[
    int, typer.Option("--max-length", help="Prompt and new tokens together, as in transformers and the reference.")
]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def benchmark(
    model: ModelOption = MODEL_DEFAULT,
    prompt: PromptOption = PROMPT,
    max_length: MaxLengthOption = 100,
    num_runs: Annotated[int, typer.Option("--num-runs", help="Timed runs of each way, after a warm-up.")] = 3,
    draft: DraftOption = None,
    tree: TreeOption = TREE_DEFAULT,
    dtype: DtypeOption = Dtype.auto,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a bar chart to this .png, .svg or .pdf.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the model as loaded against the model with Triton kernels, and plain decoding of both."""
    check_text(prompt)
    check_counts(max_length=max_length, num_runs=num_runs)
    check_flags(tree, Kernels.auto, max_length)
    check_plot(plot)
    loaded = open_for_bench(model, draft, tree, dtype)

    from eagle.bench.compare import compare

    ids = encode_prompt(loaded.get_tokenizer(), prompt, raw=is_raw(loaded))
    new_tokens = room_for_steps(len(ids), max_length, loaded.target.context_length)
    if loaded.device.type != "cuda":
        note(NO_GPU)
    settle_tree(loaded, tree)
    with progress() as told:
        found = compare(loaded, ids, new_tokens, repeats=num_runs, told=told)
    if as_json:
        asked = {
            "prompt_tokens": len(ids),
            "max_length": max_length,
            "max_new_tokens": new_tokens,
            "num_runs": num_runs,
        }
        print(json.dumps(settings(model, draft, loaded) | asked | found.to_json(), ensure_ascii=False))
    else:
        print(headline(model, loaded))
        print(f"prompt of {len(ids)} tokens, at most {new_tokens} new ones, {num_runs} run(s) after a warm-up, greedy")
        print()
        for line in lines(found, device_name(loaded.device), sixteen_bits=loaded.base_model.dtype.itemsize == 2):
            print(line)
    if plot is not None:
        from eagle.bench.run_plots import plot_ways

        plot_ways(found.ways, headline(model, loaded), plot)
        note(f"wrote {plot}")


def lines(found: Comparison, device: str, *, sixteen_bits: bool = False) -> list[str]:
    """The comparison for people. sixteen_bits: whether the model computes in float16 or bfloat16."""
    from eagle.bench.compare import LOADED

    has_peak = found.ways[0].figures.peak_memory_bytes is not None
    head = (*HEAD, *(["peak GB"] if has_peak else []), "speed-up")
    shown = aligned(head, [_cells(found, way) for way in found.ways])
    shown += ["", f"measured read bandwidth of {device}: {found.read_gb_s:.1f} GB/s; speed-up: over plain, as loaded"]
    if found.kernel_ops:
        shown.append(f"Triton kernels serve, optimised: {', '.join(found.kernel_ops)}")
    else:
        shown.append(f"optimised: no Triton kernel serves, {found.kernels_off}")
    if not found.changed:
        shown.append("optimising changed nothing here, so there is nothing to time against the model as loaded")
    shown.append(f"outputs identical: {'yes' if found.identical else 'NO'}")
    shown += [
        f"  {pair}: {'yes' if where is None else f'no, first at new token {where + 1}'}"
        for pair, where in found.partings().items()
    ]
    shown += [f"  {way.name}: its own runs differ from each other" for way in found.ways if not way.figures.repeatable]
    differing = [pair for pair, where in found.partings().items() if where is not None]
    where = OWN_MODULES if found.library_products else "as loaded"
    if sixteen_bits and differing and (found.library_products or all(LOADED in pair for pair in differing)):
        shown.append("  " + NEAR_TIES.format(where=where))
    return shown


def _cells(found: Comparison, way: Way) -> list[str]:
    figures = way.figures
    seconds = (figures.seconds_min, figures.seconds_median, figures.seconds_max)
    cells = [
        way.name,
        *(f"{value:.3f}" for value in seconds),
        f"{way.tokens_per_second:.1f}",
        f"{figures.step_ms:.2f}",
        f"{figures.accept_length:.2f}",
        f"{way.gb_s:.1f}",
        f"{way.gb_s / found.read_gb_s:.0%}",
    ]
    if figures.peak_memory_bytes is not None:
        cells.append(f"{figures.peak_memory_bytes / 1e9:.2f}")
    return [*cells, f"{found.speedup(way):.2f}x"]
