"""Other engines on the same folders and prompts, each setting in a process of its own under one clock.

Where an engine is not installed, its rows say so; where it fails, its row carries the last line of its error. Speculative
rows are compared with the same engine's plain row, output by output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eagle.bench.runs import parting
from eagle.errors import InvalidInputError

WORKER = Path(__file__).with_name("peer_worker.py")
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900.0
"""Seconds a setting may take: the largest engines compile for minutes before they answer."""
PLAIN = "plain"
MEASURED, ABSENT, FAILED = "measured", "absent", "failed"
DISTRIBUTIONS = {
    "eagle": "eagle-triton-kernels",
    "transformers": "transformers",
    "vllm": "vllm",
    "sglang": "sglang",
}
"""Engine (the module's name too) → distribution."""
PROBE = """
import importlib, importlib.metadata, importlib.util, json, sys
found, version = importlib.util.find_spec(sys.argv[1]) is not None, None
try:
    version = importlib.metadata.version(sys.argv[2])
except importlib.metadata.PackageNotFoundError:
    if found:
        version = getattr(importlib.import_module(sys.argv[1]), "__version__", None)
print(json.dumps([found, version]))
"""
PROBE_SECONDS = 120.0
_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Peer:
    """One engine in one setting; ``options`` are the worker's, empty for plain decoding."""

    engine: str
    setting: str
    options: dict[str, Any] = field(default_factory=dict)


def known_peers(tree: tuple[int, int, int] = (60, 7, 10), kind: str = "eagle3") -> tuple[Peer, ...]:
    """This package with ``tree`` and every other engine, plain decoding of each first. kind: the head's, as
    `eagle.model.draft_config.DraftConfig` has it."""
    name = "EAGLE-3" if kind == "eagle3" else "EAGLE"
    vllm = {"method": "eagle3" if kind == "eagle3" else "eagle"}
    sglang = {"speculative_algorithm": "EAGLE3" if kind == "eagle3" else "EAGLE"}
    return (
        Peer("eagle", PLAIN),
        Peer("eagle", "EAGLE " + "/".join(map(str, tree)), {"tree": list(tree)}),
        Peer("transformers", PLAIN),
        Peer("transformers", "prompt lookup, 10 tokens", {"prompt_lookup_num_tokens": 10}),
        Peer("vllm", PLAIN),
        Peer("vllm", f"{name}, chain of 3", vllm | {"num_speculative_tokens": 3}),
        Peer("sglang", PLAIN),
        Peer("sglang", f"{name}, 5 steps, top-k 4, 16 nodes", sglang | _sglang(5, 4, 16)),
        Peer("sglang", f"{name}, 7 steps, top-k 10, 60 nodes", sglang | _sglang(7, 10, 60)),
    )


def _sglang(steps: int, top_k: int, nodes: int) -> dict[str, Any]:
    return {
        "speculative_num_steps": steps,
        "speculative_eagle_topk": top_k,
        "speculative_num_draft_tokens": nodes,
    }


@dataclass
class PeerRow:
    """One setting's outcome; times are of whole calls, prefill included."""

    engine: str
    setting: str
    state: str
    version: str | None = None
    reason: str = ""
    prompts: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    steps: int | None = None
    """Target passes after prefill's; None where the engine does not tell."""
    identical: int | None = None
    """Outputs that equal the engine's own plain ones; None for plain rows and where there are none."""
    outputs: list[list[int]] = field(default_factory=list, repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def step_ms(self) -> float | None:
        """Milliseconds a step, prefill shared out among the steps."""
        return 1e3 * self.seconds / self.steps if self.steps else None

    @property
    def accept_length(self) -> float | None:
        """Tokens a step, the one that prefill yields left out."""
        return (self.new_tokens - self.prompts) / self.steps if self.steps else None

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the outputs."""
        values = {name: value for name, value in vars(self).items() if name != "outputs"}
        return values | {
            "tokens_per_second": self.tokens_per_second,
            "step_ms": self.step_ms,
            "accept_length": self.accept_length,
        }


@dataclass(frozen=True)
class Work:
    """What every engine is given. target, head: plain Hugging Face folders, such as ``eagle fetch --out`` leaves."""

    target: Path
    head: Path
    prompts: list[list[int]]
    max_new_tokens: int
    dtype: str = "auto"
    """As transformers has it."""


def measure_peers(
    work: Work,
    peers: Sequence[Peer],
    *,
    pythons: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    logs: Path | None = None,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[PeerRow]:
    """Run the settings one after another.

    pythons: the interpreter in which an engine is installed, by engine; this one for the rest. logs: a folder for what
    each process printed. told: (what runs, settings done, settings in all). Raises InvalidInputError for an interpreter
    that can't be run.
    """
    pythons = dict(pythons or {})
    for engine, python in pythons.items():
        if shutil.which(python) is None:
            raise InvalidInputError(f"the Python for {engine} is {python!r}, which can't be run; give its path")
    probes: dict[str, Probe] = {}
    rows: list[PeerRow] = []
    for index, peer in enumerate(peers):
        told(f"{peer.engine}, {peer.setting}", index, len(peers))
        python = pythons.get(peer.engine, sys.executable)
        if peer.engine not in probes:
            probes[peer.engine] = probe(peer.engine, python)
        there = probes[peer.engine]
        row = PeerRow(peer.engine, peer.setting, there.state, there.version, there.reason, prompts=len(work.prompts))
        if there.state == MEASURED:
            _run(row, peer, work, python, timeout, logs)
            _compare(row, rows)
        rows.append(row)
    told("", len(peers), len(peers))
    return rows


@dataclass(frozen=True)
class Probe:
    """Whether an engine can be run: MEASURED if so, otherwise ABSENT or FAILED with the reason."""

    state: str
    version: str | None = None
    reason: str = ""


def probe(engine: str, python: str) -> Probe:
    """Ask ``python`` whether it has an engine, and in which version. One that gives no answer has failed."""
    command = [python, "-c", PROBE, engine, DISTRIBUTIONS.get(engine, engine)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=_environment(python), timeout=PROBE_SECONDS
        )
        if done.returncode != 0:
            said = last_error(done.stderr) or last_error(done.stdout)
            return Probe(FAILED, reason=said or f"{python} ended with exit code {done.returncode} and said nothing")
        found, version = json.loads((done.stdout.splitlines() or [""])[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        return Probe(FAILED, reason=f"{python} can't be asked for {engine}: {error}"[:300])
    except (ValueError, TypeError):
        said = last_error(done.stderr) or last_error(done.stdout)
        return Probe(FAILED, reason=f"{python} is no Python that answers" + (f": {said}" if said else ""))
    if not found:
        return Probe(ABSENT, reason=f"{engine} is not installed in {python}")
    return Probe(MEASURED, version)


def _run(row: PeerRow, peer: Peer, work: Work, python: str, timeout: float, logs: Path | None) -> None:
    request = {name: str(value) if isinstance(value, Path) else value for name, value in vars(work).items()}
    request |= {"engine": peer.engine, "options": peer.options}
    with TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        printed = _log_path(logs or Path(folder), peer)
        with printed.open("w", encoding="utf-8") as log:
            code = _supervise([python, str(WORKER), str(asked), str(answered)], log, timeout, _environment(python))
        if not answered.is_file():
            row.state, row.reason = FAILED, _why(code, timeout, printed)
            return
        answer = json.loads(answered.read_text(encoding="utf-8"))
    row.outputs, row.steps, row.load_seconds = answer["outputs"], answer["steps"], answer["load_seconds"]
    row.seconds, row.new_tokens = sum(answer["seconds"]), sum(map(len, row.outputs))
    if row.steps is None and peer.setting == PLAIN:
        row.steps = row.new_tokens - row.prompts


def _supervise(command: list[str], log: Any, timeout: float, environment: dict[str, str]) -> int | None:
    """The exit code, or None where the time was over and the process and its children were ended."""
    own_group = os.name == "posix"
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=own_group,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also after a regular end: engines leave worker processes behind, which would hold the GPU's memory.
        if own_group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.kill()
        process.wait()


def _why(code: int | None, timeout: float, printed: Path) -> str:
    line = last_error(printed.read_text(encoding="utf-8", errors="replace"))
    if code is None:
        return f"not done after {timeout:g} seconds" + (f"; last: {line}" if line else "")
    if code < 0:
        return f"ended by signal {-code}" + (f"; last: {line}" if line else "")
    return line or f"ended with exit code {code} and said nothing"


def last_error(text: str) -> str:
    """The last line that names an exception, otherwise the last line that says anything; at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR_LINE.match(line)]
    return (named or lines or [""])[-1][:300]


def _compare(row: PeerRow, earlier: list[PeerRow]) -> None:
    plain = next((one for one in earlier if one.engine == row.engine and one.setting == PLAIN), None)
    if plain is None or row.setting == PLAIN or not plain.outputs or not row.outputs:
        return
    row.identical = sum(parting(one, other) is None for one, other in zip(row.outputs, plain.outputs, strict=True))


def _log_path(folder: Path, peer: Peer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (re.sub(r"[^a-z0-9]+", "-", f"{peer.engine}-{peer.setting}".lower()).strip("-") + ".log")


def _environment(python: str) -> dict[str, str]:
    """The process's environment; under this interpreter this package is found even where it is not installed."""
    found = dict(os.environ)
    if python == sys.executable:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (found.get("PYTHONPATH"), str(ROOT))))
    return found
