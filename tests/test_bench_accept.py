"""The accept length: its arithmetic, its prompts and the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

from eagle.bench.accept import AcceptReport, PromptResult, lines, measure_acceptance
from eagle.bench.prompts import Prompt, read_prompts
from eagle.cli import main
from eagle.errors import InvalidInputError

CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    return save_pair(tmp_path_factory.mktemp("pair"))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split()]


def test_own_prompts():
    prompts = read_prompts()
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 3)
    assert len({prompt.text for prompt in prompts}) == 24
    assert read_prompts(limit=5) == prompts[:5]


def test_files_of_each_form(tmp_path):
    path = tmp_path / "prompts"
    path.write_text(
        '\ufeff{"turns": ["a ß", "b"], "category": "x", "question_id": 3}\n\n{"prompt": "c"}\n', encoding="utf-8"
    )
    assert read_prompts(path) == [Prompt("a ß", "x"), Prompt("c")]
    path.write_bytes(b'first prompt\r\n\n  {"not": "read as JSON"}\n')
    assert read_prompts(path) == [Prompt("first prompt"), Prompt('{"not": "read as JSON"}')]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"prompt": "a"', "not valid JSON"),
        (b"plain", "not valid JSON"),
        (b'["a"]', "JSON object"),
        (b'{"question": "a"}', "neither"),
        (b'{"turns": []}', "turns"),
        (b'{"turns": "a"}', "turns"),
        (b'{"turns": [3]}', "3"),
        (b'{"prompt": " "}', "prompt"),
        (b'{"prompt": "a", "category": 4}', "category"),
        (b'{"prompt": "\xff"}', "UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, words):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + bad + b"\n")
    with pytest.raises(InvalidInputError, match="line 3") as caught:
        read_prompts(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n \n")
    with pytest.raises(InvalidInputError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(InvalidInputError, match="cannot read"):
        read_prompts(tmp_path)
    with pytest.raises(InvalidInputError, match="limit is 0"):
        read_prompts(limit=0)


def test_the_figures_of_a_report():
    report = AcceptReport(
        [
            PromptResult("a", [1] * 8, [3, 1, 3], [1] * 8),
            PromptResult("b", [1, 2], [1], [1, 3]),
            PromptResult("a", [1], [], [1]),
        ],
        levels=2,
    )
    assert report.accept_length() == 8 / 4
    assert report.accept_length("a") == 7 / 3
    assert report.accept_length("b") == 1
    assert report.identical() == (2, 3)
    assert report.identical("a") == (2, 2)
    assert report.histogram() == {1: 2, 2: 0, 3: 2}
    assert report.acceptance_by_position() == [0.5, 0.5]
    values = report.as_dict()
    assert values["categories"]["b"] == {"accept_length": 1.0, "prompts": 1, "identical": 0}
    assert values["different"] == [2]
    text = "\n".join(lines(report))
    assert "2 of 3" in text
    assert "1.000  identical 0 of 1" in text
    assert text.endswith("differ: 2")


def test_tau_follows_from_acceptance_by_position():
    random = torch.randint(1, 6, (50,)).tolist()
    report = AcceptReport([PromptResult("a", [], random, [])], levels=4)
    assert report.accept_length() == pytest.approx(1 + sum(report.acceptance_by_position()))
    assert sum(report.histogram().values()) == 50


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_measuring_a_model(batch):
    model = tiny_eagle(vocab_size=17)
    prompts = [Prompt("3 4 5 6 7", "a"), Prompt("9", "b"), Prompt("1 2 3", "a")]
    done = []
    report = measure_acceptance(model, prompts, numbers, max_new_tokens=23, batch=batch, advance=done.append)
    assert sum(done) == 3
    assert report.identical() == (3, 3)
    steps = 0
    for prompt, result in zip(prompts, report.results, strict=True):
        ids = torch.tensor([numbers(prompt.text)])
        assert result.tokens == model.generate(ids, max_new_tokens=23)[0, ids.shape[1] :].tolist()
        assert result.accept_lengths == model.last_stats.accept_lengths
        assert result.category == prompt.category
        assert 1 + sum(result.accept_lengths) == len(result.tokens)
        steps += model.last_stats.steps
    values = report.as_dict()
    assert values["steps"] == steps
    assert values["new_tokens"] == 69
    assert values["tokens_per_second"] > 0


def test_a_prompt_beyond_the_context_is_named():
    model = tiny_eagle(max_position_embeddings=16)
    with pytest.raises(InvalidInputError, match="prompt 2 has 16 tokens"):
        measure_acceptance(model, [Prompt("1"), Prompt("1 " * 16)], numbers)
    with pytest.raises(InvalidInputError, match="batch is 0"):
        measure_acceptance(model, [Prompt("1")], numbers, batch=0)


def test_a_difference_is_counted(monkeypatch):
    monkeypatch.setattr("eagle.bench.accept._plain", lambda model, ids, count: [[0] for _ in ids])
    report = measure_acceptance(tiny_eagle(), [Prompt("1"), Prompt("2")], numbers, max_new_tokens=4)
    assert report.identical() == (0, 2)


def test_the_command(capsys, pair):
    command = ["bench", "accept", "--model", str(pair), "--limit", "5", "-n", "9", "--tree", "12,2,4"]
    assert main([*command, "--batch", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["prompts"] == values["identical"] == 5
    assert values["batch"] == 2
    assert values["tree"] == [12, 2, 4]
    assert sum(values["histogram"].values()) == values["steps"]
    assert len(values["acceptance_by_position"]) == 3
    assert list(values["categories"]) == ["writing", "roleplay"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"accept length {values['accept_length']:.3f}, outputs identical to plain decoding: 5 of 5" in printed
