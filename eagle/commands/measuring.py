"""What the measuring commands share: loading with notes, checks on counts, progress, aligned tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer

from eagle import __version__
from eagle.commands.console import choose_tree, device_name, note, quiet_libraries
from eagle.commands.options import TREE_DEFAULT, Dtype, parse_tree
from eagle.commands.reply import NO_TEMPLATE, has_template
from eagle.errors import InvalidInputError
from eagle.versions import installed_version

if TYPE_CHECKING:
    import torch

    from eagle.model.ea_model import EaModel

FEW_TOKENS = 16

LINE_SECONDS = 10.0
"""Between lines of progress, where standard error is no terminal."""

NEEDS_GPU = "eagle bench {} needs a CUDA device, and this process sees none; eagle doctor shows what it sees"

NO_GPU = "no GPU: these are the figures of a CPU, which say little about a GPU's"

SLOW_ON_CPU = (
    "no GPU: a pass over a tree takes several times one over a token; fewer prompts (--limit), tokens (-n) or nodes "
    "(--tree) make this shorter"
)


def open_for_bench(name: str, draft: str | None, tree: str, dtype: Dtype) -> EaModel:
    """Load a pair to measure, with the notes a user needs. Raises what `load_for_bench` raises."""
    shape = parse_tree(tree)
    wanted = None if dtype is Dtype.auto else dtype.value
    from eagle.bench.load import builds_in_memory, load_for_bench, prepare

    prepare(name, draft, wanted)  # before the libraries are quiet: a first use draws bars of its own
    quiet_libraries()
    from rich.console import Console

    # What is built draws a bar of its own.
    with nullcontext() if builds_in_memory(name) else Console(stderr=True).status(f"Loading {name}"):
        model = load_for_bench(name, draft, wanted, tree=shape)
    if any("untrained" in line for line in model.draft_notes):
        note("the draft head is untrained: the output is exact, but it comes no sooner than by plain decoding")
    if not has_template(model.get_tokenizer()):
        note(NO_TEMPLATE)
    return model


def settle_tree(model: EaModel, tree: str, options: Mapping[str, Any] | None = None) -> None:
    """Where ``--tree`` is auto, give a model as loaded the tree that is fastest for it as optimised with ``options``.
    Raises what optimising raises."""
    if tree != TREE_DEFAULT:
        return
    from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

    _, originals = optimize_eagle_with_triton(model, **(options or {}))
    try:
        choose_tree(model)
    finally:
        restore_eagle(model, originals)


def is_raw(model: EaModel) -> bool:
    """Whether prompts go in as they stand, for want of a chat template."""
    return not has_template(model.get_tokenizer())


def check_counts(**counts: int | None) -> None:
    """Raises a usage error for an option whose value is below 1; None stands for an option that was not given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is {value}; expected at least 1")


def settings(name: str, draft: str | None, model: EaModel) -> dict[str, Any]:
    """What was measured where, as JSON values."""
    shape = model.tree_shape
    return {
        "model": name,
        "draft": draft,
        "dtype": dtype_name(model),
        "tree": [shape.total_token, shape.depth, shape.top_k],
        **machine(model.device),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The device, the versions, and where figures taken now come from, as JSON values."""
    from eagle.bench.provenance import clocks, provenance

    packages = ("torch", "transformers", "triton")
    return {
        "device": device_name(device),
        "gpu": device.type == "cuda",
        "versions": {"eagle-triton-kernels": __version__} | {name: installed_version(name) for name in packages},
        "provenance": provenance(device) | {"clocks": clocks(device)},
    }


def room_for_steps(length: int, max_length: int, context: int) -> int:
    """New tokens after a prompt of ``length`` tokens. Raises InvalidInputError where so few are left that no step of
    decoding would run: the first token is prefill's."""
    from eagle.model.inputs import token_budgets

    [new_tokens] = token_budgets([length], context, None, max_length, 1)
    if new_tokens < 2:
        raise InvalidInputError(
            f"--max-length {max_length} leaves {new_tokens} new token after the prompt's {length}, and no step would run; "
            f"give at least {length + 2}, or {length + FEW_TOKENS} for figures that mean something"
        )
    if new_tokens < FEW_TOKENS:
        note(f"only {new_tokens} new tokens after the prompt's {length}: too few for figures that mean much")
    return new_tokens


def dtype_name(model: EaModel) -> str:
    return str(model.base_model.dtype).removeprefix("torch.")


def headline(name: str, model: EaModel, *, tree: bool = True) -> str:
    """Model, dtypes, tree (if wanted) and device in one line."""
    shape, engine = model.tree_shape, model.engine
    drafted = f", tree {shape.total_token}/{shape.depth}/{shape.top_k}" if tree else ""
    one_byte = (("target", engine.target_dtype), ("draft", engine.draft_dtype))
    weights = "".join(f", {part}'s weights in {dtype}" for part, dtype in one_byte if dtype is not None)
    return f"{name}, {dtype_name(model)}{weights}{drafted}, on {device_name(model.device)}"


def kernels_line(model: EaModel) -> str:
    """What serves the ops now, in one line."""
    choices = model.kernel_report()
    served = list(dict.fromkeys(choice.op for choice in choices if choice.implementation == "triton"))
    steps = ", ".join(f"{choice.op} {choice.implementation}" for choice in choices if choice.op in ("step", "target"))
    if not served:
        return f"no Triton kernel serves: {choices[0].reason}; {steps}"
    return f"Triton kernels serve {', '.join(served)}; {steps}"


@contextmanager
def progress(what: str = "runs") -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; where that is no terminal, a line at times. → a function to tell what runs now, how much
    is done and how much there is."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _told_in_lines(what)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _told_in_lines(what: str) -> Callable[[str, int, int], None]:
    """For a log: the first line at once, the next ones LINE_SECONDS apart."""
    said = float("-inf")

    def tell(name: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if name and now - said >= LINE_SECONDS:
            said = now
            print(f"{name}: {done} of {total} {what}", file=sys.stderr, flush=True)

    return tell


@contextmanager
def spinner() -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A line on standard error, where that is a terminal, that says what goes on. → a function to say it, and one to
    take the line away, as is needed before anything is printed."""
    from rich.console import Console

    status = Console(stderr=True).status("")

    def tell(what: str) -> None:
        status.update(what)
        status.start()

    try:
        yield tell, status.stop
    finally:
        status.stop()


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in plain text: the first column to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join((first, *others)).rstrip()

    return [line(row) for row in (head, *rows)]
