"""What the measuring commands share: the measured tree, and where figures come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

import eagle
from eagle.bench import compare, provenance
from eagle.cli import main, run
from eagle.commands import benchmark, integration_test, measuring
from eagle.commands.measuring import headline, machine, progress, room_for_steps, settle_tree
from eagle.engine.tree_choice import TreeFigures
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.ops import TreeShape
from eagle.model.triton_kernels import optimize_eagle_with_triton

FASTEST = TreeShape(11, 3, 2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(29)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[list[list[int]]]:
    """As if steps were captured, which is where trees are measured; → the prompts of each measurement."""
    found = []

    def measure_trees(model, rows, told=None):
        found.append(rows)
        return [TreeFigures(FASTEST, 100.0, 1.0, 2.0, 3, 3)]

    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(EaModel, "captures_steps", True)
    monkeypatch.setattr("eagle.engine.tree_choice.measure_trees", measure_trees)
    monkeypatch.setattr("eagle.bench.read_speed.read_gb_s", lambda device: 12.5)
    monkeypatch.setattr("eagle.commands.bench_report._bandwidth", lambda device: 12.5)
    monkeypatch.setattr("eagle.bench.compare.read_gb_s", lambda device: 12.5)
    return found


def test_only_auto_measures_and_the_model_stays_as_loaded(measured):
    model = tiny_eagle()
    before = model.tree_shape, model.ops, model.engine
    settle_tree(model, "20,3,4")
    assert not measured
    assert (model.tree_shape, model.ops, model.engine) == before


COMMANDS = {
    "generate": ["--quick", "--limit", "1", "-n", "3"],
    "roofline": ["--quick", "-n", "3"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_auto_is_measured(command, pair, measured, capsys):
    options = ["bench", command, "--model", str(pair), *COMMANDS[command], "--json"]
    assert main(options) == 0
    values = json.loads(capsys.readouterr().out)
    values = values["models"][0] if command == "roofline" else values
    assert values["tree"] == [11, 3, 2]
    assert len(measured) == 1
    assert main(options) == 0
    assert len(measured) == 1, "it is remembered"
    assert main([*options, "--tree", "9,2,3"]) == 0


def test_a_report_measures_the_tree_once_for_all_parts(pair, measured, tmp_path):
    out, parts = tmp_path / "out", "generate,roofline,accept"
    options = ["--quick", "--limit", "1", "-n", "3", "--parts", parts, "--out", str(out)]
    assert main(["bench", "report", "--models", str(pair), *options]) == 0
    found = json.loads((out / "report.json").read_text())["models"][str(pair)]["parts"]
    assert [result["tree"] for result in found.values()] == [[11, 3, 2]] * 3
    assert len(measured) == 1


def test_benchmark_has_one_tree_for_all_ways(pair, measured, capsys, monkeypatch):
    shapes, measure = [], compare.measure
    monkeypatch.setattr(
        compare, "measure", lambda model, *args, **kw: shapes.append(model.tree_shape) or measure(model, *args, **kw)
    )
    options = ["--model", str(pair), "--prompt", "Hello", "--max-length", "45", "--num-runs", "1", "--json"]
    assert run(benchmark.app, "benchmark.py", options) == 0
    assert json.loads(capsys.readouterr().out)["tree"] == [11, 3, 2]
    assert set(shapes) == {FASTEST}
    assert len(shapes) >= 2


def test_the_integration_test_measures_nothing(pair, measured, capsys):
    options = ["--model", str(pair), "--prompt", "Hello", "--max-length", "45", "--num-runs", "1"]
    assert run(integration_test.app, "integration_test.py", options) == 0
    assert "9 checks: 9 passed" in capsys.readouterr().out
    assert not measured


def test_the_headline_names_one_byte_weights():
    model = tiny_eagle()
    assert headline("m", model).startswith("m, float32, tree 20/3/4, on ")
    optimize_eagle_with_triton(model, target_dtype="int8", draft_dtype="int8")
    assert "float32, target's weights in int8, draft's weights in int8, tree" in headline("m", model)


def test_a_log_gets_progress_in_lines(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    with progress() as told:
        for done in range(4):
            told("EAGLE", done, 8)
            now[0] += measuring.LINE_SECONDS / 2
        told("plain", 4, 8)
        now[0] += measuring.LINE_SECONDS
        told("", 8, 8)
    assert capsys.readouterr().err.splitlines() == ["EAGLE: 0 of 8 runs", "EAGLE: 2 of 8 runs", "plain: 4 of 8 runs"]


def test_figures_say_where_they_come_from():
    values = json.loads(json.dumps(machine(torch.device("cpu"))))
    assert values["gpu"] is False
    assert values["versions"]["eagle-triton-kernels"] == eagle.__version__ != "0.0.0"
    assert values["versions"]["torch"] is not None
    assert {"date", "commit", "command", "platform", "clocks"} <= set(values["provenance"])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["/usr/bin/eagle", "bench", "step"], "eagle bench step"),
        (["/x/eagle/cli.py", "models"], "eagle models"),
        (["/x/benchmark.py", "--prompt", "a b"], "python benchmark.py --prompt 'a b'"),
    ],
)
def test_the_command_is_as_it_was_typed(typed, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", typed)
    assert provenance.command_line() == line


def test_a_limit_that_leaves_no_step_is_refused(capsys):
    assert room_for_steps(20, 60, 512) == 40
    assert room_for_steps(20, 24, 512) == 4
    assert "only 4 new tokens" in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match=r"leaves 1 new token after the prompt's 20.* give at least 22, or 36"):
        room_for_steps(20, 21, 512)
