"""`eagle bench report`: what is asked for, measured and written as one HTML file, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.bench_generate import BUILT_IN
from eagle.commands.bench_peers import PeerPythonOption, PeerTimeoutOption, check_timeout, peer_pythons, run_peers
from eagle.commands.bench_roofline import free_memory
from eagle.commands.console import note
from eagle.commands.measuring import NO_GPU, aligned, check_counts, is_raw, open_for_bench, progress, settle_tree
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    DtypeOption,
    Kernels,
    TargetDtypeOption,
    TreeOption,
    WeightDtype,
    check_flags,
)
from eagle.commands.reply import encode_prompt
from eagle.errors import EagleError, InvalidInputError

if TYPE_CHECKING:
    import torch

    from eagle.bench.report import Content
    from eagle.bench.report_parts import Plan

PARTS = "generate,roofline"
NEW_TOKENS, QUICK_TOKENS, QUICK_PROMPTS = 128, 32, 4
ROOFLINE = (4, 64)
QUICK_ROOFLINE = (1, 32)
"""Prompts and new tokens of the roofline, whose figures as loaded take long."""
INTERPRETER_SECONDS = 60.0
GPU_BATCH = 16


def report(
    models: Annotated[
        str, typer.Option("--models", "--model", "-m", help="Names, folders or hub ids, separated by commas.")
    ] = MODEL_DEFAULT,
    parts: Annotated[
        str, typer.Option("--parts", help="Of kernels,generate,roofline,sweep,accept,peers, separated by commas.")
    ] = PARTS,
    with_peers: Annotated[bool, typer.Option("--peers", help="The same as 'peers' among the parts.")] = False,
    draft: DraftOption = None,
    prompts: Annotated[
        str,
        typer.Option("--prompts", help="A file as for 'bench accept', or built-in: 24 prompts of the package's own."),
    ] = BUILT_IN,
    limit: Annotated[int | None, typer.Option("--limit", help="Prompts, spread over the set. Default: all.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help=f"Default: {NEW_TOKENS}.")
    ] = None,
    tree: TreeOption = TREE_DEFAULT,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"{QUICK_PROMPTS} prompts × {QUICK_TOKENS} tokens, unless said otherwise; a short roofline and sweep.",
        ),
    ] = False,
    peer_python: PeerPythonOption = None,
    peer_timeout: PeerTimeoutOption = 900.0,
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html, report.md and report.json.")] = Path(
        "build/report"
    ),
    add: Annotated[
        bool, typer.Option("--add", help="Add to the report in --out, and replace in it what is measured anew.")
    ] = False,
) -> None:
    """Measure models and write one report. After each part it is on disk, so a run that is cut off leaves its results."""
    from eagle.bench.prompts import read_prompts

    check_counts(limit=limit, max_new_tokens=max_new_tokens)
    tokens = max_new_tokens or (QUICK_TOKENS if quick else NEW_TOKENS)
    check_flags(tree, Kernels.auto, tokens)
    check_timeout(peer_timeout)
    asked = parse_parts(parts, with_peers)
    names = [name for name in (part.strip() for part in models.split(",")) if name]
    if not names:
        raise InvalidInputError("--models names no model; give at least one")
    from eagle.model.locate import check_name

    for name in names:
        check_name(name)
    pythons = peer_pythons(peer_python)
    every = read_prompts(None if prompts == BUILT_IN else Path(prompts))
    count = min(limit or (QUICK_PROMPTS if quick else len(every)), len(every))
    chosen = every[:: max(1, len(every) // count)][:count]

    import torch

    from eagle.bench.provenance import clocks, provenance
    from eagle.bench.report import MODEL_PARTS, NAME, failures, measured, opened, ran, record, save
    from eagle.bench.report_parts import Plan, kernels_part
    from eagle.bench.report_summary import HEAD, summary_rows
    from eagle.bench.sweep import QUICK, Grid

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        note(NO_GPU)
    origin = provenance(device) | {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({torch.get_num_threads()} threads)",
        "transformers": _transformers_version(),
        "models": names,
        "parts": list(asked),
        "prompts": f"{len(chosen)} of {prompts}",
        "max_new_tokens": tokens,
        "quick": quick,
        "clocks_before": clocks(device),
    }
    if not add and (out / f"{NAME}.json").exists():
        note(f"the report in {out} is replaced; --add keeps what it holds")
    content = opened(out, origin, on_gpu, add)
    save(content, out)  # before anything is measured: a folder that can't be written is found now
    roofline = QUICK_ROOFLINE if quick else ROOFLINE
    plan = Plan(
        chosen,
        tokens,
        QUICK if quick else Grid(),
        min(roofline[0], len(chosen)),
        roofline[1],
        GPU_BATCH if on_gpu else 1,
        {"draft_dtype": draft_dtype.setting, "target_dtype": target_dtype.setting},
    )
    with progress("report") as told:
        if "kernels" in asked:
            seconds = None if on_gpu else INTERPRETER_SECONDS
            content["kernels"] = _attempt("kernels", lambda: kernels_part(device, seconds, told))
            save(content, out)
        for name in names:
            shape = tree
            if wanted := [part for part in asked if part in MODEL_PARTS]:
                shape = _model_parts(content, name, wanted, plan, (draft, tree, dtype), out, told)
                free_memory()  # for the next model, and for the other engines
            if "peers" in asked:
                rows = _attempt(
                    f"{name}, peers",
                    lambda name=name, shape=shape: run_peers(
                        name, draft, chosen, tokens, shape, dtype, None, pythons, peer_timeout, out / "peers", told
                    ),
                )
                record(content, name, "peers", rows)
                save(content, out)
    content["runs"][-1] |= {"clocks_after": clocks(device), "complete": True}
    written = save(content, out)
    if rows := summary_rows(content):
        print("\n".join(aligned(HEAD, rows)), end="\n\n")
    for path in written:
        print(f"wrote {path}")
    run = ran(content, names, asked)
    if found := failures(run):
        if not measured(run):
            raise EagleError(f"nothing could be measured: {'; '.join(found)}")
        note(*found)
        raise typer.Exit(1)


def parse_parts(text: str, with_peers: bool = False) -> tuple[str, ...]:
    """The parts asked for, in the order they run. Raises InvalidInputError."""
    from eagle.bench.report import PARTS as KNOWN

    asked = {part.strip() for part in text.split(",") if part.strip()} | ({"peers"} if with_peers else set())
    if odd := sorted(asked - set(KNOWN)):
        raise InvalidInputError(f"--parts names {', '.join(odd)}; expected some of {','.join(KNOWN)}")
    if not asked:
        raise InvalidInputError(f"--parts is empty; expected some of {','.join(KNOWN)}")
    return tuple(part for part in KNOWN if part in asked)


def _model_parts(
    content: Content,
    name: str,
    parts: list[str],
    plan: Plan,
    loading: tuple[str | None, str, Dtype],
    out: Path,
    told: Callable[[str, int, int], None],
) -> str:
    """Load a model and run its parts. What fails is recorded, and the others go on. → the tree, as --tree has it."""
    from eagle.bench.report import record, save
    from eagle.bench.report_parts import ModelParts, part_failures

    told(f"loading {name}", 0, 1)
    entry = content["models"].setdefault(name, {"parts": {}})
    entry.pop("error", None)
    try:
        model = open_for_bench(name, *loading)
        settle_tree(model, loading[1], plan.weights)
    except part_failures() as error:
        entry["error"] = " ".join(str(error).split())
        note(f"{name}: {error}")
        save(content, out)
        return loading[1]
    tokenizer, raw = model.get_tokenizer(), is_raw(model)
    parts_of = ModelParts(
        model,
        plan,
        lambda text: encode_prompt(tokenizer, text, raw=raw),
        lambda: _bandwidth(model.device),
        lambda what, done, total: told(f"{name}: {what}", done, total),
    )
    for part in parts:
        record(content, name, part, _attempt(f"{name}, {part}", lambda part=part: parts_of.run(part)))
        save(content, out)
        note(f"{name}: {part} done")
    shape = model.tree_shape
    return f"{shape.total_token},{shape.depth},{shape.top_k}"


def _attempt(what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or the error in its place: one part's trouble is not the report's."""
    from eagle.bench.report_parts import part_failures

    try:
        return work()
    except part_failures() as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        note(f"{what} failed: {reason}")
        return {"error": reason}


@cache
def _bandwidth(device: torch.device) -> float:
    from eagle.bench.read_speed import read_gb_s

    return read_gb_s(device)


def _transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")
