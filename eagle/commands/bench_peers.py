"""`eagle bench peers`: other engines on the same folders and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.bench_generate import BUILT_IN
from eagle.commands.console import device_name, note, quiet_libraries
from eagle.commands.measuring import NO_GPU, aligned, check_counts, machine, progress
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    TREE_METAVAR,
    DraftOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Kernels,
    ModelOption,
    check_flags,
    parse_tree,
)
from eagle.commands.outputs import check_out
from eagle.commands.reply import encode_prompt, has_template
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from eagle.bench.prompts import Prompt

PROMPTS, NEW_TOKENS = 8, 128
QUICK_PROMPTS, QUICK_TOKENS = 2, 32
PeerPythonOption = Annotated[
    list[str] | None,
    typer.Option(
        "--peer-python",
        metavar="ENGINE=PATH",
        help="The Python in which an engine is installed, such as vllm=/opt/vllm/bin/python; may be repeated.",
    ),
]
PeerTreeOption = Annotated[
    str,
    typer.Option(
        "--tree",
        metavar=TREE_METAVAR,
        help="This package's draft tree. auto, not measured here: 60,7,10 on a GPU, 8,4,2 on a CPU.",
    ),
]
PeerTimeoutOption = Annotated[
    float, typer.Option("--peer-timeout", help="Seconds that each engine's setting may take.")
]


def peers(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    engines: Annotated[
        list[str] | None,
        typer.Option("--engine", help="eagle, transformers, vllm or sglang; may be repeated. Default: all."),
    ] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", help="A file as for 'bench accept', or built-in: the package's own.")
    ] = BUILT_IN,
    limit: Annotated[int | None, typer.Option("--limit", help=f"Prompts. Default: {PROMPTS}.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help=f"Default: {NEW_TOKENS}.")
    ] = None,
    tree: PeerTreeOption = TREE_DEFAULT,
    dtype: DtypeOption = Dtype.auto,
    peer_python: PeerPythonOption = None,
    timeout: PeerTimeoutOption = 900.0,
    logs: Annotated[Path | None, typer.Option("--logs", help="Folder for what each engine prints.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"{QUICK_PROMPTS} prompts, {QUICK_TOKENS} new tokens, unless said otherwise."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """This package, transformers, vLLM and SGLang on the same model, head and prompts, those that are installed."""
    from eagle.bench.prompts import read_prompts

    check_counts(limit=limit, max_new_tokens=max_new_tokens)
    tokens = max_new_tokens or (QUICK_TOKENS if quick else NEW_TOKENS)
    check_flags(tree, Kernels.auto, tokens)
    check_timeout(timeout)
    check_out(logs, "--logs", folder=True)
    pythons = peer_pythons(peer_python)
    check_engines(engines)
    every = read_prompts(None if prompts == BUILT_IN else Path(prompts))
    count = min(limit or (QUICK_PROMPTS if quick else PROMPTS), len(every))
    chosen = every[:: max(1, len(every) // count)][:count]
    with progress("engines") as told:
        values = run_peers(model, draft, chosen, tokens, tree, dtype, engines, pythons, timeout, logs, told)
    if as_json:
        values = {"model": model, "draft": draft} | machine(_device()) | values
        print(json.dumps(values, ensure_ascii=False))
    else:
        from eagle.bench.report_tables import CPU_MARK, peers_section

        section = peers_section(model, values)
        title = f"{section.title}, on {values['device']}"
        mark = () if values["gpu"] else (CPU_MARK,)
        for line in (title, *mark, "", *aligned(section.head, section.rows), "", *section.notes):
            print(line)
    from eagle.bench.peers import FAILED

    if any(row["state"] == FAILED for row in values["rows"]):
        raise typer.Exit(1)


def check_timeout(seconds: float) -> None:
    """Raises InvalidInputError for a --peer-timeout in which nothing can run."""
    if not seconds > 0:
        raise InvalidInputError(f"--peer-timeout is {seconds:g}; expected more than 0 seconds")


def peer_pythons(given: list[str] | None) -> dict[str, str]:
    """ENGINE=PATH options as a mapping. Raises InvalidInputError."""
    found = {}
    for text in given or ():
        engine, sign, path = text.partition("=")
        if not sign or not path:
            raise InvalidInputError(
                f"--peer-python is {text!r}; expected ENGINE=PATH, such as vllm=/opt/vllm/bin/python"
            )
        check_engines([engine])
        found[engine] = path
    return found


def check_engines(names: list[str] | None) -> None:
    """Raises InvalidInputError for an engine that nobody knows here."""
    from eagle.bench.peers import DISTRIBUTIONS

    for name in names or ():
        if name not in DISTRIBUTIONS:
            raise InvalidInputError(f"the engine is {name!r}; expected one of {', '.join(DISTRIBUTIONS)}")


def run_peers(
    model: str,
    draft: str | None,
    prompts: list[Prompt],
    max_new_tokens: int,
    tree: str,
    dtype: Dtype,
    engines: list[str] | None,
    pythons: dict[str, str],
    timeout: float,
    logs: Path | None,
    told: Any,
) -> dict[str, Any]:
    """Make plain folders of model and head, encode the prompts, run the engines. → what was run where and the rows, as
    JSON values. Raises what fetching raises."""
    from tempfile import TemporaryDirectory

    from eagle.bench.peers import Work, known_peers, measure_peers
    from eagle.model.fetch import fetch
    from eagle.model.loading import load_tokenizer
    from eagle.model.locate import no_head
    from eagle.model.portable_head import portable_head

    folders = fetch(model, ea_model_path=draft)
    if len(folders) < 2:
        raise no_head(str(folders[0]))
    quiet_libraries()
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        note(NO_GPU)
    tokenizer = load_tokenizer(str(folders[0]), {})
    if tokenizer is None:
        raise InvalidInputError(f"the model {model} has no tokenizer; add tokenizer.json and its config to it")
    raw = not has_template(tokenizer)
    ids = [encode_prompt(tokenizer, prompt.text, raw=raw) for prompt in prompts]
    wanted = dtype.value if dtype is not Dtype.auto else "auto" if on_gpu else "float32"
    with TemporaryDirectory() as place:
        target = folders[0].resolve()
        head, kind = portable_head(target, folders[1].resolve(), Path(place, "head"))
        shape = parse_tree(tree)
        chosen = [peer for peer in known_peers(shape, kind) if not engines or peer.engine in engines]
        work = Work(target, head, ids, max_new_tokens, wanted)
        rows = measure_peers(work, chosen, pythons=pythons, timeout=timeout, logs=logs, told=told)
    return {
        "device": device_name(_device()),
        "gpu": on_gpu,
        "tree": list(shape),
        "dtype": wanted,
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "rows": [row.to_json() for row in rows],
    }


def _device() -> torch.device:
    """What the engines run on, each in its own process."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
