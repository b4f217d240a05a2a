"""Equality of outputs: found where there is one, and every difference reported with its place."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

from eagle.bench import equality
from eagle.bench.equality import compare, lengthened
from eagle.cli import main
from eagle.engine.settings import EngineSettings
from eagle.model import triton_kernels
from eagle.model.ops import TreeShape

SHAPES = (TreeShape(12, 2, 3), TreeShape(4, 2, 1))


def prompts(count: int = 5) -> list[list[int]]:
    return [torch.randint(1, 17, (3 + index,)).tolist() for index in range(count)]


def test_every_way_is_compared() -> None:
    model = tiny_eagle()
    before, seen = model.tree_shape, []
    found = compare(model, prompts(), 15, SHAPES, (1, 3), told=seen.append)
    assert seen == found
    assert [(row.shape, row.batch) for row in found] == [
        (None, 1), (SHAPES[0], 1), (SHAPES[1], 1), (SHAPES[0], 3), (SHAPES[1], 3), (None, 3)
    ]  # fmt: skip
    assert all(row.equal == row.prompts == 5 and row.tokens == 75 and not row.partings for row in found)
    assert found[1].accept_length > 1.0 == found[0].accept_length == found[-1].accept_length
    assert [row.is_reference for row in found] == [True] + [False] * 5
    assert str(found[0]).startswith("plain, batch 1, the reference: 5 of 5 equal, 75 tokens")
    assert all(row.step_ms > 0 for row in found)
    assert f"{found[0].step_ms:.2f} ms a step" in str(found[0])
    assert model.tree_shape == before


def test_a_difference_is_placed(monkeypatch) -> None:
    original = equality._decode

    def wrong(model, rows, new, batch, *, speculative):
        outputs, *figures = original(model, rows, new, batch, speculative=speculative)
        if speculative:
            outputs[2][6] ^= 1
        return outputs, *figures

    monkeypatch.setattr(equality, "_decode", wrong)
    reference, result = compare(tiny_eagle(), prompts(), 15, SHAPES[:1])
    assert not reference.partings
    assert result.partings == {3: 7}
    assert "4 of 5 equal" in str(result)
    assert "prompt 3 parts at token 7" in str(result)
    assert result.to_json()["equal"] == 4


def test_prompts_are_lengthened_in_front() -> None:
    assert lengthened([1, 2], [7, 8, 9], 9) == [7, 8, 9, 7, 8, 9, 7, 1, 2]
    assert lengthened([1, 2], [7], 2) == [1, 2]
    assert lengthened([1, 2, 3], [7], 2) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "exact", "said"), [((), "auto", "auto"), (("--exact",), True, "on"), (("--no-exact",), False, "off")]
)
def test_the_command_records_how_exact_it_was(options, exact, said, tmp_path, capsys, monkeypatch) -> None:
    pair, out, asked = save_pair(tmp_path / "pair"), tmp_path / "found.json", []

    def seen(model, **given):
        asked.append(given["exact"])
        model.configure_engine(EngineSettings(exact=given["exact"]))

    monkeypatch.setattr(triton_kernels, "optimize_eagle_with_triton", seen)
    command = ["bench", "equality", "--model", str(pair), "--limit", "2", "-n", "4", "--tree", "8,2,3"]
    assert main([*command, "--batch", "1", "--batch", "2", "--out", str(out), *options]) == 0
    assert asked == [exact]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith(f", exact: {said}")
    assert [line.split(":")[0] for line in lines] == [
        "plain, batch 1, the reference", "8,2,3, batch 1", "8,2,3, batch 2", "plain, batch 2"
    ]  # fmt: skip
    rows = json.loads(out.read_text())["results"]
    assert [(row["name"], row["batch"]) for row in rows] == [("plain", 1), ("8,2,3", 1), ("8,2,3", 2), ("plain", 2)]
    assert all(row["exact"] == exact and row["equal"] == 2 and row["step_ms"] > 0 for row in rows)


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path, monkeypatch) -> None:
    pair, out, decode, runs = save_pair(tmp_path / "pair"), tmp_path / "found.json", equality._decode, []

    def cut_off(*args, **options):
        runs.append(args)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return decode(*args, **options)

    monkeypatch.setattr(equality, "_decode", cut_off)
    command = ["bench", "equality", "--model", str(pair), "--limit", "2", "-n", "4", "--tree", "8,2,3", "--batch", "1"]
    assert main([*command, "--batch", "2", "--out", str(out)]) == 130
    assert [row["name"] for row in json.loads(out.read_text())["results"]] == ["plain", "8,2,3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernels that it asks for")
def test_exactness_that_no_kernel_gives_is_refused_and_not_claimed(tmp_path, capsys) -> None:
    command = ["bench", "equality", "--model", str(save_pair(tmp_path / "pair")), "--limit", "1", "-n", "2"]
    assert main([*command, "--exact"]) == 2
    assert "exact is True, which needs the attention kernel" in capsys.readouterr().err
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(", exact: off")


@pytest.mark.parametrize("option", [("--batch", "0"), ("--batch", "-1"), ("--prefix", "-1")], ids=" ".join)
def test_counts_are_checked_before_anything_is_loaded(option, capsys) -> None:
    assert main(["bench", "equality", "--model", "no/such/model", *option]) == 2
    assert option[0] in capsys.readouterr().err
