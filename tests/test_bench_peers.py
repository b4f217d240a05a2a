"""`eagle bench peers`: the others' processes, their figures, and what becomes of those that are absent or fail."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_engines import write_engines
from tiny_folder import save_pair

import eagle
from eagle.bench import peer_worker
from eagle.bench.peers import (
    ABSENT,
    DISTRIBUTIONS,
    FAILED,
    MEASURED,
    PLAIN,
    Peer,
    Probe,
    Work,
    known_peers,
    last_error,
    measure_peers,
    probe,
)
from eagle.cli import main
from eagle.commands.options import parse_tree
from eagle.errors import InvalidInputError
from eagle.model.checkpoint_files import read_tensors
from eagle.model.checkpoints import load_draft, save_draft
from eagle.model.draft_config import TargetSpec
from eagle.model.portable_head import portable_head

PROMPTS = [[3, 4, 5], [8, 2], [9, 1, 1]]
OTHERS = tuple(peer for peer in known_peers() if peer.engine in ("vllm", "sglang"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(13)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """Makes stand-ins importable in the engines' processes."""

    def install(*names: str) -> None:
        folder = write_engines(tmp_path / "site", *names)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return install


def work(folder: Path = Path("x")) -> Work:
    return Work(folder / "target", folder / "head", PROMPTS, 9)


def test_engines_are_measured_and_compared(engines, tmp_path, monkeypatch):
    engines("vllm", "sglang")
    monkeypatch.setenv("FAKE_VLLM", "differ")
    told = []
    rows = measure_peers(work(), OTHERS, logs=tmp_path / "logs", told=lambda *what: told.append(what))
    assert [row.state for row in rows] == [MEASURED] * 5, [row.reason for row in rows]
    assert {row.version for row in rows} == {"9.1"}
    vllm, chain, sglang, small, large = rows
    for row in rows:
        assert (row.prompts, row.new_tokens) == (3, 27)
        assert row.tokens_per_second == pytest.approx(27 / row.seconds)
        assert row.step_ms == pytest.approx(1e3 * row.seconds / row.steps)
    assert vllm.steps == sglang.steps == 24
    assert vllm.accept_length == sglang.accept_length == 1.0
    assert (chain.steps, chain.accept_length) == (12, 2.0)
    assert (small.steps, large.accept_length) == (6, 4.0)
    assert vllm.identical is sglang.identical is None
    assert chain.identical == sum(sum(prompt) % 2 == 0 for prompt in PROMPTS) == 2
    assert small.identical == large.identical == 3
    assert told[0] == ("vllm, plain", 0, 5)
    assert told[-1] == ("", 5, 5)
    assert "shut down" in (tmp_path / "logs/sglang-plain.log").read_text()
    assert "outputs" not in json.loads(json.dumps(chain.to_json()))


def test_absent_engines_are_listed(engines):
    engines("sglang")
    rows = measure_peers(work(), OTHERS)
    assert [row.state for row in rows] == [ABSENT] * 2 + [MEASURED] * 3
    assert "vllm is not installed in" in rows[0].reason
    assert rows[0].tokens_per_second == 0.0
    assert rows[0].step_ms is None


def test_a_crash_says_its_last_line_and_the_others_go_on(engines, monkeypatch):
    engines("vllm", "sglang")
    monkeypatch.setenv("FAKE_VLLM", "crash")
    monkeypatch.setenv("FAKE_SGLANG", "exit")
    vllm, chain, sglang, *_ = rows = measure_peers(work(), OTHERS[:3])
    assert [row.state for row in rows] == [MEASURED, FAILED, FAILED]
    assert chain.reason == "ValueError: the head has 32000 rows,"
    assert sglang.reason == "no kernel image is available"
    assert chain.identical is None
    assert vllm.new_tokens == 27


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_engine_that_is_killed_or_hangs(engines, tmp_path, monkeypatch):
    engines("vllm", "sglang")
    monkeypatch.setenv("FAKE_VLLM", "killed")
    monkeypatch.setenv("FAKE_SGLANG", "hang")
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "child"))
    started = time.monotonic()
    killed, hung = measure_peers(work(), [OTHERS[0], OTHERS[2]], timeout=3)
    assert time.monotonic() - started < 30
    assert killed.reason.startswith("ended by signal 9")
    assert hung.reason == "not done after 3 seconds; last: compiling"
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("one\n\n two \n", "two"),
        ("Traceback\nRuntimeError: a\n[rank0]: leaked semaphores\n", "RuntimeError: a"),
        ("a.b.CudaError: x\ntorch.OutOfMemoryError: y", "torch.OutOfMemoryError: y"),
        ("x" * 400, "x" * 300),
    ],
)
def test_the_line_that_tells(text, line):
    assert last_error(text) == line


def script(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="a shell script as an interpreter")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exit 0", "is no Python that answers"),
        ("echo hello", "is no Python that answers"),
        ("echo 3", "is no Python that answers"),
        ("echo import broke >&2; exit 3", "import broke"),
        ("exit 3", "ended with exit code 3 and said nothing"),
    ],
)
def test_a_python_that_gives_no_answer_has_failed(tmp_path, text, words):
    rows = measure_peers(work(), OTHERS[:2], pythons={"vllm": script(tmp_path, text)})
    assert [row.state for row in rows] == [FAILED, FAILED]
    assert all(words in row.reason for row in rows)


def test_a_checkout_that_is_not_installed_tells_its_version(monkeypatch):
    monkeypatch.setitem(DISTRIBUTIONS, "eagle", "no-such-distribution")
    assert probe("eagle", sys.executable) == Probe(MEASURED, eagle.__version__)


def test_a_python_that_is_not_there():
    with pytest.raises(InvalidInputError, match="the Python for vllm is '/no/python'"):
        measure_peers(work(), OTHERS, pythons={"vllm": "/no/python"})


def test_the_worker_runs_this_package_and_transformers_alike(pair):
    request = {"target": str(pair / "target"), "head": str(pair / "head"), "prompts": PROMPTS, "max_new_tokens": 8}
    request["dtype"] = "float32"

    def run(peer: Peer) -> dict:
        return peer_worker.run(request | {"engine": peer.engine, "options": peer.options})[0]

    answers = [run(peer) for peer in known_peers((9, 2, 3)) if peer.engine in ("eagle", "transformers")]
    plain, tree, theirs, lookup = answers
    assert plain["outputs"] == tree["outputs"] == theirs["outputs"] == lookup["outputs"]
    assert len(plain["seconds"]) == 3
    tokens = sum(map(len, plain["outputs"]))
    assert plain["steps"] == theirs["steps"] == tokens - 3
    assert 0 < tree["steps"] <= plain["steps"]
    assert 0 < lookup["steps"] <= plain["steps"]


def test_every_prompt_runs_once_before_the_clock_starts(monkeypatch):
    ran = []

    class Engine:
        def __init__(self, request):
            pass

        def generate(self, ids):
            ran.append(tuple(ids))
            return [len(ran)]

        def steps(self):
            return len(ran)

    monkeypatch.setitem(peer_worker.ENGINES, "vllm", Engine)
    answer, _ = peer_worker.run({"engine": "vllm", "prompts": PROMPTS})
    assert ran == [tuple(prompt) for prompt in PROMPTS] * 2
    assert answer["outputs"] == [[4], [5], [6]]
    assert answer["steps"] == len(answer["seconds"]) == 3


def test_plain_decoding_of_an_engine_comes_first():
    seen = set()
    for peer in known_peers():
        assert peer.engine in seen or peer.setting == PLAIN
        assert (peer.setting == PLAIN) == (not peer.options)
        seen.add(peer.engine)


def test_an_eagle_1_head_is_called_one():
    peers = known_peers(kind="eagle1")
    assert [peer.setting for peer in peers if peer.engine == "vllm"] == ["plain", "EAGLE, chain of 3"]
    assert peers[5].options["method"] == "eagle"
    assert {peer.options["speculative_algorithm"] for peer in peers[7:]} == {"EAGLE"}


def test_a_head_without_an_output_matrix_gets_the_targets_rows(pair, tmp_path):
    spec = TargetSpec(16, 259, 4)
    given = load_draft(pair / "head", spec)
    assert portable_head(pair / "target", pair / "head", tmp_path / "unused") == (pair / "head", "eagle3")
    assert not (tmp_path / "unused").exists()
    del given.tensors["lm_head.weight"]
    save_draft(given, tmp_path / "bare")
    folder, kind = portable_head(pair / "target", tmp_path / "bare", tmp_path / "whole")
    assert (folder, kind) == (tmp_path / "whole", "eagle3")
    found = load_draft(folder, spec)
    rows = torch.arange(60) + given.tensors["d2t"]
    output = read_tensors(pair / "target")["lm_head.weight"]
    assert torch.equal(found.tensors["lm_head.weight"], output[rows])
    assert found.config == given.config
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in given.tensors.items())


def test_the_command(pair, engines, capsys, monkeypatch, tmp_path):
    engines("vllm")
    monkeypatch.setenv("FAKE_VLLM", "crash")
    command = ["bench", "peers", "--model", str(pair), "--engine", "vllm", "--engine", "sglang", "--quick", "-n", "9"]
    assert main([*command, "--json", "--logs", str(tmp_path / "logs")]) == 1
    values = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in values["rows"]] == [MEASURED, FAILED] + [ABSENT] * 3
    assert values["prompts"] == 2
    assert values["gpu"] is torch.cuda.is_available()
    assert values["dtype"] == ("auto" if values["gpu"] else "float32")
    assert values["tree"] == list(parse_tree("auto"))
    assert values["versions"]["eagle-triton-kernels"] == eagle.__version__
    assert {"date", "commit", "clocks"} <= set(values["provenance"])
    assert len(list((tmp_path / "logs").iterdir())) == 2
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "ValueError: the head has 32000 rows," in out
    assert "sglang is not installed" in out
    assert ("figures of a CPU" in out) is not torch.cuda.is_available()
    assert f", on {values['device']}" in out.splitlines()[0]
    monkeypatch.setenv("FAKE_VLLM", "")
    assert main(command) == 0, "an engine that is absent is no failure"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "ollama"], "the engine is 'ollama'"),
        (["--peer-python", "vllm"], "--peer-python is 'vllm'"),
        (["--peer-python", "ollama=/usr/bin/python"], "the engine is 'ollama'"),
        (["--limit", "0"], "--limit is 0"),
        (["--peer-timeout", "0"], "--peer-timeout is 0"),
        (["--peer-timeout", "nan"], "--peer-timeout is nan"),
        (["--logs", "/proc/x"], "--logs is /proc/x: cannot write to /proc/x"),
        (["--prompts", "no/such"], "cannot read the prompts in no/such"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert main(["bench", "peers", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
