"""`eagle bench roofline`: floors are bytes over bandwidth, a model comes back as it was, one that fails is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

from eagle.bench.report_tables import roofline_section
from eagle.bench.roofline import measure_roofline
from eagle.bench.step_bytes import step_bytes
from eagle.cli import main

ON_GPU = torch.cuda.is_available()
PROMPTS = [[3, 4, 5, 6], [9, 2]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(5)
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_floors_are_bytes_over_bandwidth():
    model, told = tiny_eagle(), []
    found = measure_roofline(model, PROMPTS, 13, 25.0, told=lambda *what: told.append(what))
    assert [(row.decoding, row.ops) for row in found.rows] == [("EAGLE", "as loaded"), ("plain", "as loaded")]
    for row in found.rows:
        middle = round((6 + 26 / 2) / 2)
        read = step_bytes(model, speculative=row.decoding == "EAGLE", positions=middle)
        assert row.read == read
        assert row.floor_ms == pytest.approx(1e3 * read.total / 25e9)
        assert row.share == pytest.approx(row.floor_ms / row.figures.step_ms)
        assert row.engine == "eager"
        assert row.identical == (2 if row.figures.speculative else None)
    assert found.rows[0].read.total > found.rows[1].read.total
    assert told[-1][0] == "plain, as loaded"
    values = json.loads(json.dumps(found.to_json()))
    assert values["rows"][0]["bytes"]["total"] == found.rows[0].read.total
    assert values["read_gb_per_second"] == 25.0


def test_one_token_has_no_step():
    found = measure_roofline(tiny_eagle(), PROMPTS, 1, 25.0)
    assert [row.share for row in found.rows] == [0.0, 0.0]
    section = roofline_section("m", found.to_json() | {"dtype": "float32", "tree": [1, 1, 1]})
    assert [row[5:7] for row in section.rows] == [("–", "–")] * 2


def test_weights_of_one_byte_are_what_a_step_reads():
    found = measure_roofline(tiny_eagle(), PROMPTS, 5, 25.0, options={"target_dtype": "int8", "draft_dtype": "int8"})
    loaded, _, optimised, _ = (row.read for row in found.rows)
    assert optimised.target_weights < loaded.target_weights / 2
    assert optimised.draft_weights < loaded.draft_weights / 2
    section = roofline_section(
        "m", found.to_json() | {"dtype": "float32", "tree": [1, 1, 1], "target_dtype": "int8", "draft_dtype": "same"}
    )
    assert section.notes[0].endswith("optimised: target's weights in int8")


def test_optimised_rows_follow_and_the_model_is_restored(monkeypatch):
    model = tiny_eagle()
    restored = []
    monkeypatch.setattr("eagle.bench.roofline.optimize_eagle_with_triton", lambda model: (model, {"engine": print}))
    monkeypatch.setattr("eagle.bench.roofline.restore_eagle", lambda model, originals: restored.append(originals))
    found = measure_roofline(model, PROMPTS, 5, 25.0)
    assert [row.ops for row in found.rows] == ["as loaded"] * 2 + ["optimised"] * 2
    assert restored == [{"engine": print}]


@pytest.fixture
def no_bandwidth(monkeypatch):
    monkeypatch.setattr("eagle.bench.read_speed.read_gb_s", lambda device: 12.5)


def test_the_command(pair, capsys, no_bandwidth):
    command = ["bench", "roofline", "--model", str(pair), "-n", "9", "--limit", "2", "--tree", "9,2,3"]
    assert main([*command, "--json", "--target-dtype", "int8"]) == 0
    printed = capsys.readouterr()
    [values] = json.loads(printed.out)["models"]
    assert values["rows"][0]["prompts"] == 2
    assert values["tree"] == [9, 2, 3]
    assert (values["target_dtype"], values["draft_dtype"]) == ("int8", "same")
    assert {"date", "commit", "clocks"} <= set(values["provenance"])
    assert ("no GPU" in printed.err) is not ON_GPU
    assert main([*command, "--quick"]) == 0
    out = capsys.readouterr().out
    assert "12.5 GB/s" in out
    assert "of the floor" in out


def test_a_model_that_fails_does_not_take_the_others_along(pair, capsys, no_bandwidth):
    command = ["bench", "roofline", "--quick", "-n", "4", "--tree", "9,2,3", "--json"]
    assert main([*command, "--model", str(pair), "--model", "no/such/folder"]) == 2
    assert capsys.readouterr().out == "", "a name that leads nowhere is refused before anything runs"
    assert main([*command, "--model", "nobody/nothing", "--model", str(pair)]) == 2
    printed = capsys.readouterr()
    bad, good = json.loads(printed.out)["models"]
    assert "nobody/nothing" in bad["error"]
    assert good["rows"]


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(pair, capsys, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("eagle.model.memory.host_memory", lambda: 1000)
    monkeypatch.setattr("eagle.model.loading._one_device", lambda device_map: torch.device("cpu"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    assert main(["bench", "roofline", "--model", str(pair), "--quick"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "this machine has 0.0 GB of memory" in error
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--limit", "0"], "--limit is 0"), (["-n", "0"], "--max-new-tokens is 0"), (["--tree", "4"], "--tree is '4'")],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert main(["bench", "roofline", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
