"""benchmark.py: what it compares, what it prints, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

from eagle.bench import compare as compare_module
from eagle.bench.compare import EAGLE, LOADED, OPTIMISED, PLAIN, compare
from eagle.bench.read_speed import read_gb_s
from eagle.bench.step_bytes import step_bytes
from eagle.cli import run
from eagle.commands.benchmark import app, lines
from eagle.model.torch_ops import TORCH_OPS

ON_GPU = torch.cuda.is_available()
SCRIPT = Path(__file__).resolve().parent.parent / "benchmark.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(5)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr("eagle.bench.read_speed.SUM_BYTES", {"cpu": 1 << 22})


def wrong_attention(q, *args, **kwargs):
    return TORCH_OPS.attention(q, *args, **kwargs) * -3.0


def right_attention(*args, **kwargs):
    return TORCH_OPS.attention(*args, **kwargs)


def optimise_with(monkeypatch, attention):
    """Optimising then puts in this op."""
    right, table = compare_module.optimize_eagle_with_triton, TORCH_OPS.replaced(attention=attention)
    monkeypatch.setattr(compare_module, "optimize_eagle_with_triton", lambda model: right(model, ops=table))


def test_four_ways_that_agree(monkeypatch):
    optimise_with(monkeypatch, right_attention)
    model, told = tiny_eagle(), []
    before = model.ops
    found = compare(model, [3, 4, 5], 21, repeats=2, told=lambda *what: told.append(what))
    assert [(way.decoding, way.ops) for way in found.ways] == [
        (PLAIN, LOADED),
        (EAGLE, LOADED),
        (PLAIN, OPTIMISED),
        (EAGLE, OPTIMISED),
    ]
    assert found.identical
    assert len(found.partings()) == 3
    assert found.changed == ("attention",)
    assert model.ops == before
    assert [done for _, done, _ in told] == list(range(13))
    assert {total for *_, total in told} == {12}
    plain = found.way(PLAIN, LOADED)
    assert found.speedup(plain) == 1.0
    assert plain.tokens_per_second == pytest.approx(21 / plain.figures.seconds_median)
    for way in found.ways:
        expected = step_bytes(model, speculative=way.decoding == EAGLE, positions=3 + 10).total
        assert way.bytes_per_step == expected
        assert way.gb_s == pytest.approx(expected / way.figures.step_seconds_median / 1e9)


def test_nothing_is_timed_twice_where_optimising_changes_nothing():
    found = compare(tiny_eagle(), [3, 4, 5], 7, repeats=1, warmup=0)
    assert [way.name for way in found.ways] == ["plain, as loaded", "EAGLE, as loaded"]
    assert found.changed == found.kernel_ops == ()
    assert found.kernels_off
    assert list(found.partings()) == ["EAGLE, as loaded = plain, as loaded"]
    text = "\n".join(lines(found, "a device"))
    assert "changed nothing" in text
    assert found.kernels_off in text


@pytest.mark.skipif(ON_GPU, reason="for the interpreter")
def test_kernels_that_serve_are_named(monkeypatch):
    monkeypatch.setenv("EAGLE_KERNELS_RMS_NORM", "triton")
    found = compare(tiny_eagle(), [3, 4], 4, repeats=1, warmup=0)
    assert found.kernel_ops == ("rms_norm",)
    assert found.kernels_off == ""
    assert found.identical
    assert any("serve, optimised: rms_norm" in line for line in lines(found, "a device"))


def test_a_difference_is_shown_where_it_begins(monkeypatch):
    optimise_with(monkeypatch, wrong_attention)
    model = tiny_eagle()
    found = compare(model, [3, 4, 5], 21, repeats=1, warmup=0)
    assert not found.identical
    assert model.ops == TORCH_OPS
    partings = found.partings()
    assert partings["EAGLE, as loaded = plain, as loaded"] is None
    where = partings["EAGLE, optimised = EAGLE, as loaded"]
    loaded, optimised = (found.way(EAGLE, ops).figures.outputs[0] for ops in (LOADED, OPTIMISED))
    assert loaded[:where] == optimised[:where]
    assert loaded[where] != optimised[where]
    text = "\n".join(lines(found, "a device"))
    assert "outputs identical: NO" in text
    assert f"no, first at new token {where + 1}" in text
    assert "--dtype float32 decides" not in text


def test_sixteen_bits_excuse_the_model_as_loaded_alone(monkeypatch):
    optimise_with(monkeypatch, wrong_attention)
    found = compare(tiny_eagle(), [3, 4, 5], 21, repeats=1, warmup=0)
    pairs = list(found.partings())
    for differing, excused in ((pairs[:1], True), (pairs[1:2], False), (pairs[:2], False), ((), False)):
        partings = {pair: 3 if pair in differing else None for pair in pairs}
        monkeypatch.setattr(type(found), "partings", lambda _, partings=partings: partings)
        kernels, library = (
            lines(replace(found, library_products=by_library), "a device", sixteen_bits=True)[-1]
            for by_library in (False, True)
        )
        assert ("as loaded; --dtype float32 decides" in kernels) == excused
        assert ("own modules; --dtype float32 decides" in library) == bool(differing)


def test_the_command(pair, capsys, tmp_path):
    plot = tmp_path / "bars.png"
    options = ["--model", str(pair), "--prompt", "Hello", "--max-length", "50", "--num-runs", "2", "--tree", "12,2,4"]
    assert run(app, "benchmark.py", [*options, "--json", "--plot", str(plot)]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["prompt_tokens"] + values["max_new_tokens"] == 50
    assert values["tree"] == [12, 2, 4]
    assert values["identical"] is True
    assert values["gpu"] is ON_GPU
    assert len(values["ways"]) == (4 if ON_GPU else 2)
    assert all(way["tokens_per_second"] > 0 and way["repeats"] == 2 for way in values["ways"])
    assert values["ways"][0]["speedup"] == 1.0
    assert ("no GPU" in printed.err) is not ON_GPU
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(app, "benchmark.py", options) == 0
    out = capsys.readouterr().out
    assert "outputs identical: yes" in out
    assert ("no Triton kernel serves" in out) is not ON_GPU
    assert ("peak GB" in out) is ON_GPU


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "SmolLM3"], "unknown model 'SmolLM3'"),
        (["--num-runs", "0"], "--num-runs is 0"),
        (["--max-length", "-1"], "--max-length is -1"),
        (["--prompt", " "], "the prompt is empty"),
        (["--tree", "1,2"], "--tree is '1,2'"),
        (["--plot", "bars.xyz"], "expected a file that ends in"),
        (["--plot", "README.md/bars.png"], "cannot write to"),
        (["--plot", "/proc/bars.png"], "--plot is /proc/bars.png: cannot write to /proc"),
        (["--num-run", "x"], "--num-run"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert run(app, "benchmark.py", arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_prompt_longer_than_max_length(pair, capsys):
    assert run(app, "benchmark.py", ["--model", str(pair), "--prompt", "x" * 60, "--max-length", "50"]) == 2
    assert "max_length is 50, but the prompt alone has" in capsys.readouterr().err


def test_the_script_itself():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--max-length", "0"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "benchmark.py" in done.stderr


def test_read_bandwidth_is_a_plausible_number():
    assert 0.1 < read_gb_s(torch.device("cpu")) < 10_000
