"""`eagle bench kernels` and `eagle bench tune`: what they print, and where they put it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.measuring import NEEDS_GPU
from eagle.commands.outputs import check_out, writing
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from eagle.bench.kernels import Row

INTERPRETER_SECONDS = 60.0
TUNABLE = ("linear",)

ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", help="Sizes named after this model; may be repeated. Default: all.")
]
DtypesOption = Annotated[
    list[str] | None, typer.Option("--dtype", help="float16, bfloat16 or float32; may be repeated. Default: all.")
]


def kernels(
    ops: Annotated[
        list[str] | None, typer.Option("--ops", help="An op or the beginning of its name; may be repeated.")
    ] = None,
    models: ModelsOption = None,
    dtypes: DtypesOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="8B and SmolLM2, bfloat16, prefixes 512 and 8192.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", help=f"Stop before another case. Default without a GPU: {INTERPRETER_SECONDS:g}."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Threads that compile the next cases' kernels ahead.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON, Markdown and plots.")] = Path("build/kernels"),
) -> None:
    """Each Triton kernel: correct against float64, and its time against PyTorch and the hardware's limit."""
    device = _device()
    on_gpu = device.type == "cuda"
    _check_seconds(seconds)
    _check_jobs(jobs)
    from rich.console import Console
    from rich.table import Table

    from eagle.bench.kernel_cases import select_cases
    from eagle.bench.kernels import RED, run_cases
    from eagle.bench.provenance import clocks, provenance
    from eagle.bench.report_files import COLUMNS, cells, summary, write_report

    cases = select_cases(ops or (), models or (), dtypes or (), quick=quick, interpreted=not on_gpu)
    if not cases:
        raise InvalidInputError("no case is of those ops, models and dtypes together; leave one of the filters out")
    check_out(out, folder=True)
    origin = provenance(device) | {"clocks_before": clocks(device)}
    if not on_gpu:
        origin["device"] = "CPU, Triton's interpreter"
    _say(f"{len(cases)} cases on {origin['device']}")
    report = run_cases(
        cases,
        device,
        seconds=seconds if seconds is not None or on_gpu else INTERPRETER_SECONDS,
        jobs=jobs,
        told=lambda index, row: _say(f"[{index + 1}/{len(cases)}] {row_line(row)}"),
    )
    origin["clocks_after"] = clocks(device)
    if sys.stdout.isatty():
        table = Table(*COLUMNS, box=None)
        for row in report.rows:
            table.add_row(*cells(row), style="red" if row.state == RED else None)
        Console().print(table)
    for line in summary(report):
        print(line)
    with writing(out):
        for line in write_report(report, out, origin):
            print(line)
    if report.count(RED):
        raise typer.Exit(1)


def tune(
    ops: Annotated[list[str] | None, typer.Option("--ops", help="What to tune: linear.")] = None,
    models: ModelsOption = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help="Of the rows; may be repeated. Default: bfloat16.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Stop before another candidate.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", help="Threads that compile. Default: one a core.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The table to write or add to. Default: build/tuned/<GPU>.json.")
    ] = None,
) -> None:
    """Time launch configurations on this GPU and write the best as a table."""
    from eagle.bench.kernel_cases import select_dtypes, select_models

    for op in ops or ():
        if op not in TUNABLE:
            raise InvalidInputError(f"--ops is {op!r}, which has no list of candidates; expected {', '.join(TUNABLE)}")
    _check_seconds(seconds)
    _check_jobs(jobs)
    sizes_models, sizes_dtypes = select_models(models or ()), select_dtypes(dtypes or ("bfloat16",))
    device = _device()
    if device.type != "cuda":
        raise InvalidInputError(NEEDS_GPU.format("tune"))
    from eagle.bench.provenance import clocks, provenance
    from eagle.bench.tune import Size, Tuned, sizes_of, tune_sizes, write_table
    from eagle.model.triton_kernels.tuned_table import VARIABLE, file_name

    sizes = sizes_of(sizes_models, sizes_dtypes)
    origin = provenance(device) | {"clocks_before": clocks(device)}
    path = out or Path("build/tuned") / file_name(origin["device"])
    check_out(path)
    _say(f"{len(sizes)} sizes on {origin['device']}")
    done: list[Tuned] = []

    def told(result: Tuned | Size, problem: str) -> None:
        if isinstance(result, Tuned):
            done.append(result)
            _say(tuned_line(result))
            with writing(path):
                write_table(done, path, origin)  # after each size: a run that is cut off leaves what it found
        else:
            _say(f"{result.label} {result.names[1]}: RED {problem}")

    results, left = tune_sizes(sizes, device, seconds=seconds, jobs=jobs or os.cpu_count() or 1, told=told)
    if left:
        print(f"{len(left)} of {len(sizes)} sizes were not reached in {seconds:g} seconds")
    if not results:
        raise typer.Exit(1)
    print(f"wrote {path}; to use it, set {VARIABLE}={path} or put it into the package's triton_kernels/tuned/")


def row_line(row: Row) -> str:
    """One case on one line."""
    head = f"{row.op}, {row.label}, {row.dtype}: {row.state}"
    if row.us is None:
        shown = [] if row.error is None else [f"error {row.error:.1e}"]
        return ", ".join([head, *shown, *([row.reason] if row.reason else [])])
    rivals = [
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.rivals.items()
    ]
    eager = [] if row.torch_eager_us is None else [f"eager {row.torch_eager_us:.1f}"]
    speed = [f"{row.gb_s:.0f} GB/s", f"{row.share:.0%} of the ceiling"]
    return ", ".join([head, f"error {row.error:.1e}", f"{row.us:.1f} µs", *rivals, *eager, *speed])


def tuned_line(result: Any) -> str:
    """One tuned size on one line."""
    size, config = result.size, result.config
    change = (
        "the rule's choice" if result.us == result.rule_us else f"{result.rule_us / result.us:.2f}× the rule's speed"
    )
    fields = ", ".join(f"{name} {value}" for name, value in vars(config).items())
    return (
        f"{size.label} {size.n}×{size.k} {size.names[1]}: {result.us:.1f} µs ({change}; rule {result.rule_us:.1f}, BLAS "
        f"{result.blas_us:.1f}, floor {result.floor_us:.1f}), {result.tried} tried, {len(result.failed)} failed: {fields}"
    )


def _device() -> torch.device:
    """The GPU, or the CPU with Triton's interpreter, which must be chosen before triton is first imported."""
    if importlib.util.find_spec("triton") is None:
        raise InvalidInputError("triton is not installed, and these are Triton's kernels: pip install 'triton>=3.6'")
    import torch

    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return torch.device("cuda", torch.cuda.current_device())
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def _check_seconds(seconds: float | None) -> None:
    if seconds is not None and seconds <= 0:
        raise InvalidInputError(f"--seconds is {seconds:g}; expected more than 0")


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise InvalidInputError(f"--jobs is {jobs}; expected at least 1")


def _say(line: str) -> None:
    print(line, flush=True)
