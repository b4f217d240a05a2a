"""`eagle bench sweep`: padded prompts have the wanted length, cells their figures or a reason, the best tree is best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import byte_tokenizer, save_pair

from eagle.bench.prefixes import padded_prompts
from eagle.bench.prompts import read_prompts
from eagle.bench.sweep import Grid, measure_sweep
from eagle.cli import main
from eagle.commands.reply import encode_prompt
from eagle.errors import InvalidInputError, OutOfMemoryError
from eagle.model.ops import TreeShape

TEXTS = [prompt.text for prompt in read_prompts()]
TREES = (TreeShape(9, 2, 3), TreeShape(4, 3, 1))


def encoder(raw: bool = False):
    tokenizer = byte_tokenizer(None) if raw else byte_tokenizer()
    return lambda text: encode_prompt(tokenizer, text, raw=raw)


@pytest.mark.parametrize("raw", [False, True], ids=["template", "raw"])
@pytest.mark.parametrize("length", [53, 128, 1000, 6001])
def test_prompts_have_the_wanted_length(length, raw):
    encode = encoder(raw)
    prompts = padded_prompts(encode, TEXTS, length, 3)
    assert [len(prompt) for prompt in prompts] == [length] * 3
    assert len({tuple(prompt) for prompt in prompts}) == 3
    for text, prompt in zip(TEXTS, prompts, strict=False):
        whole = encode(text)
        shared = min(length, len(whole)) - 30
        assert prompt[-shared:] == whole[-shared:]
        assert prompt[:1] == whole[:1] or raw


def test_a_template_with_no_room_is_refused():
    head_and_tail = len(encoder()("ab")) - 2
    with pytest.raises(InvalidInputError, match=f"give at least {head_and_tail + 1}"):
        padded_prompts(encoder(), TEXTS, head_and_tail, 1)


def encode_small(text: str) -> list[int]:
    return [1, 2, *(ord(letter) % 13 + 3 for letter in text), 16]


def test_cells_and_their_best():
    model, told = tiny_eagle(max_position_embeddings=128), []
    before = model.tree_shape
    grid = Grid(TREES, prefixes=(20, 64, 120), batches=(1, 3), new_tokens=10, prompts=2)
    cells = measure_sweep(model, encode_small, TEXTS, grid, told=lambda *what: told.append(what))
    assert model.tree_shape == before
    assert [(cell.prefix, cell.batch) for cell in cells] == [(p, b) for p in (20, 64, 120) for b in (1, 3)]
    for cell in cells[:4]:
        assert [row.shape for row in cell.rows] == [None, *TREES]
        for row in cell.rows:
            assert row.figures.prompts == row.identical == max(2, cell.batch)
            assert row.figures.new_tokens == 10 * max(2, cell.batch)
            assert row.figures.prompt_tokens == cell.prefix * max(2, cell.batch)
        assert cell.best.tokens_per_second == max(row.tokens_per_second for row in cell.rows[1:])
    for cell in cells[4:]:
        assert cell.reason == "120 + 10 tokens exceed the model's context of 128"
        assert cell.best is None
    assert told[0] == ("plain at 20 × 1", 0, 18)
    assert json.loads(json.dumps(cells[0].to_json()))["best"] in ([9, 2, 3], [4, 3, 1])


def test_no_cell_is_measured_before_all_prefixes_are_checked():
    told = []
    with pytest.raises(InvalidInputError, match="a prefix of 3 tokens has no room"):
        measure_sweep(
            tiny_eagle(), encode_small, TEXTS, Grid(TREES, (24, 3), (1,), 4, 1), told=lambda *what: told.append(what)
        )
    assert not told


def test_no_end_token_ends_a_reply():
    model = tiny_eagle(eos_token_id=5)
    model.base_model.generation_config.eos_token_id = list(range(17))
    [cell] = measure_sweep(model, encode_small, TEXTS, Grid(TREES[:1], (24,), (1,), 12, 1))
    assert [row.figures.new_tokens for row in cell.rows] == [12, 12]


def test_what_a_device_or_a_head_refuses_gets_a_reason(monkeypatch):
    from eagle.bench import sweep

    real = sweep.measure

    def measure(model, prompts, new_tokens, **options):
        if options["batch"] == 2:
            raise OutOfMemoryError("2 sequences take 90.0 GB")
        return real(model, prompts, new_tokens, **options)

    monkeypatch.setattr(sweep, "measure", measure)
    grid = Grid((TreeShape(20, 1, 19), *TREES), (20,), (1, 2), 4, 1)
    one, two = measure_sweep(tiny_eagle(), encode_small, TEXTS, grid)
    assert one.rows[1].reason == "the head has 17 tokens, fewer than top_k"
    assert one.best.shape in TREES
    assert {row.reason for row in two.rows[2:]} == {"2 sequences take 90.0 GB"}
    assert two.best is None
    assert two.rows[0].tokens_per_second == 0.0
    assert replace(one.rows[0], figures=None).to_json() == {"tree": None, "reason": ""}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_the_command(pair, capsys):
    command = ["bench", "sweep", "--model", str(pair), "--tree", "9,2,3", "--tree", "4,3,1", "-n", "6"]
    sizes = ["--prefix", "100", "--prefix", "600", "--batch", "2"]
    assert main([*command, *sizes, "--quick", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    first, second = values["cells"]
    assert [row["tree"] for row in first["rows"]] == [None, [9, 2, 3], [4, 3, 1]]
    assert "exceed the model's context" in second["reason"]
    assert main([*command, *sizes, "--quick"]) == 0
    out = capsys.readouterr().out
    assert "(best)" in out
    assert "prefix 600, batch 2: not measured" in out


def test_a_sweep_of_nothing_is_refused(pair, capsys):
    assert main(["bench", "sweep", "--model", str(pair), "--quick", "--prefix", "100000"]) == 2
    assert "beyond the model's context of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prefix", "0"], "--prefix is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["-n", "0"], "--max-new-tokens is 0"),
        (["--tree", "60,7"], "--tree is '60,7'"),
        (["--tree=-1,3,4"], "--tree is -1,3,4"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert main(["bench", "sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
