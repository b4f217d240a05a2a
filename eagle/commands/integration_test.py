"""`integration_test.py`: a whole model, kernels on and off, checked on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.benchmark import PROMPT, MaxLengthOption, PromptOption
from eagle.commands.console import note
from eagle.commands.measuring import check_counts, dtype_name, headline, is_raw, open_for_bench, room_for_steps, spinner
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    TREE_METAVAR,
    DraftOption,
    Dtype,
    Kernels,
    ModelOption,
    check_flags,
)
from eagle.commands.reply import check_text, decode, encode_prompt

if TYPE_CHECKING:
    from eagle.bench.integration import Check, Difference
    from eagle.model.ea_model import EaModel

BATCH_ROWS = 3
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def integration_test(
    model: ModelOption = MODEL_DEFAULT,
    prompt: PromptOption = PROMPT,
    max_length: MaxLengthOption = 100,
    num_runs: Annotated[int, typer.Option("--num-runs", help="Runs, original and optimised, that must agree.")] = 3,
    draft: DraftOption = None,
    tree: Annotated[
        str,
        typer.Option("--tree", metavar=TREE_METAVAR, help="The draft tree. auto: 60,7,10 on a GPU, a small one else."),
    ] = TREE_DEFAULT,
    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="In float32 every check must hold; in 16 bits some compare near-ties only."),
    ] = Dtype.float32,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the texts, and where they part.")] = False,
) -> None:
    """Check that kernels, streaming, batches and restoring leave the model's output as it was. Exit code 1: they don't."""
    check_text(prompt)
    check_counts(max_length=max_length, num_runs=num_runs)
    check_flags(tree, Kernels.auto, max_length)
    loaded = open_for_bench(model, draft, tree, dtype)

    from eagle.bench.integration import FAIL, PASS, Bench, kernels_in_use, run_checks

    tokenizer = loaded.get_tokenizer()
    ids = encode_prompt(tokenizer, prompt, raw=is_raw(loaded))
    new_tokens = room_for_steps(len(ids), max_length, loaded.target.context_length)
    served, why_not = kernels_in_use(loaded)
    print(headline(model, loaded))
    print(f"prompt of {len(ids)} tokens, at most {new_tokens} new ones")
    print(
        f"optimised: Triton kernels serve {', '.join(served)}" if served else f"optimised: no Triton kernel, {why_not}"
    )
    if not served:
        note("without a kernel, original and optimised are the same PyTorch ops; a GPU makes that check a real one")
    if dtype_name(loaded) != "float32":
        note(f"{dtype_name(loaded)}: ways that sum in another order may part at a near-tie; float32 must agree")
    bench = Bench(loaded, ids, _batch_rows(loaded, ids), new_tokens, num_runs)
    found: list[Check] = []
    with spinner() as (tell, quiet):
        for check in run_checks(bench, lambda name, done, total: tell(f"{done + 1} of {total}: {name}")):
            found.append(check)
            quiet()
            print(f"{check.state}  {check.name}: {check.reason}", flush=True)
            for difference in check.differences if verbose else ():
                for line in parting_lines(tokenizer, difference):
                    print(f"      {line}", flush=True)
    if verbose:
        for name, tokens in (("original", bench.original), ("optimised", bench.optimised)):
            print(f"\n{name}:\n{decode(tokenizer, tokens, special=True)}")
    failed, passed = (sum(check.state == state for check in found) for state in (FAIL, PASS))
    print(f"\n{len(found)} checks: {passed} passed, {failed} failed, {len(found) - passed - failed} skipped")
    if failed:
        raise typer.Exit(1)


def parting_lines(tokenizer: Any, difference: Difference) -> Iterator[str]:
    """What two outputs share, and how each goes on."""
    where, first = difference.where, difference.outputs[0]
    yield f"the same up to new token {where}: {decode(tokenizer, list(first[:where]), special=True)!r}"
    for name, output in zip(difference.names, difference.outputs, strict=True):
        rest = list(output[where:])
        went_on = f"token {rest[0]}, {decode(tokenizer, rest, special=True)!r}" if rest else "nothing more"
        yield f"{name} goes on with {went_on}"


def _batch_rows(model: EaModel, ids: list[int]) -> list[list[int]]:
    """Prompts of other lengths that fit the model's context, to run in a batch with ``ids``."""
    from eagle.bench.prompts import read_prompts

    tokenizer, raw = model.get_tokenizer(), is_raw(model)
    rows = [encode_prompt(tokenizer, prompt.text, raw=raw) for prompt in read_prompts(limit=BATCH_ROWS - 1)]
    fitting = [row for row in rows if len(row) < model.target.context_length]
    return fitting or [ids[: -(-len(ids) // 2)]]
