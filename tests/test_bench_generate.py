"""`eagle bench generate`: its figures, its files, its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

from eagle import __version__
from eagle.bench.generate import closing_lines, measure_prompts, rows
from eagle.cli import main
from eagle.errors import InvalidInputError

ON_GPU = torch.cuda.is_available()
PROMPTS = [[3, 4, 5], [9], [1, 2]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(11)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("batch", [1, 2])
def test_both_ways(batch):
    told = []
    report = measure_prompts(tiny_eagle(), PROMPTS, 15, batch=batch, told=lambda *what: told.append(what))
    assert report.identical == 3
    assert report.eagle.outputs == report.plain.outputs
    assert report.eagle.speculative
    assert not report.plain.speculative
    assert report.plain.accept_length == 1.0
    assert report.speedup == report.eagle.tokens_per_second / report.plain.tokens_per_second
    total = told[-1][2]
    assert [done for _, done, _ in told] == list(range(1, total + 1))
    assert [name for name, *_ in told] == ["EAGLE"] * (total // 2) + ["plain"] * (total // 2)


def test_differences_are_numbered_from_one():
    report = measure_prompts(tiny_eagle(), PROMPTS, 6, warmup=0)
    outputs = report.eagle.outputs
    other = (outputs[0], (*outputs[1][:4], -1, -1), outputs[2][:2])
    changed = replace(report, plain=replace(report.plain, outputs=other))
    assert changed.partings() == {2: 5, 3: 3}
    assert changed.identical == 1
    shown = list(closing_lines(changed))
    assert "outputs identical to plain decoding: 1 of 3" in shown
    assert "  prompt 2 parts at new token 5" in shown


def test_rows_are_for_both_ways():
    report = measure_prompts(tiny_eagle(), PROMPTS, 6, warmup=0)
    table = {what: (eagle, plain) for what, eagle, plain in rows(report)}
    assert table["accept length"] == (f"{report.eagle.accept_length:.2f}", "1.00")
    assert table["time per step, ms, median"][0] == f"{report.eagle.step_ms:.2f}"
    assert "peak memory, GB" not in table
    with_gpu = replace(
        report,
        eagle=replace(report.eagle, peak_memory_bytes=2_500_000_000),
        plain=replace(report.plain, peak_memory_bytes=10**9),
    )
    assert ("peak memory, GB", "2.50", "1.00") in list(rows(with_gpu))


def test_a_prompt_beyond_the_context_is_named():
    with pytest.raises(InvalidInputError, match="prompt 2 has 16 tokens"):
        measure_prompts(tiny_eagle(max_position_embeddings=16), [[1], [2] * 16], 4)


def test_the_command(pair, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\nand two\nthree, at last\n")
    command = ["bench", "generate", "--model", str(pair), "--prompts", str(prompts), "-n", "11", "--tree", "12,2,4"]
    assert main([*command, "--batch", "2", "--json", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["identical"] == 3
    assert values["batch"] == values["eagle"]["batch"] == 2
    assert values["eagle"]["new_tokens"] == values["plain"]["new_tokens"] <= 33
    assert len(values["eagle"]["acceptance_by_position"]) == 4
    assert values["gpu"] is ON_GPU
    assert values["versions"]["eagle-triton-kernels"] == __version__
    origin = values["provenance"]
    assert {"date", "commit", "command", "clocks", "device"} <= set(origin)
    assert (origin["clocks"] is None) is not ON_GPU
    assert ("no GPU" in printed.err) is not ON_GPU
    assert json.loads((tmp_path / "out/generate.json").read_text()) == values
    text = (tmp_path / "out/generate.md").read_text()
    assert ("figures of a CPU" in text) is not ON_GPU
    assert "| accept length |" in text
    assert main([*command, "--limit", "2", "--kernels", "torch"]) == 0
    out = capsys.readouterr().out
    assert "outputs identical to plain decoding: 2 of 2" in out
    assert "2 prompts, at most 11 new tokens each" in out


def test_quick_takes_four_prompts_spread_over_the_set(pair, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "eagle.commands.bench_generate.encode_prompt", lambda tokenizer, text, raw: seen.append(text) or [1, 2, 3]
    )
    assert main(["bench", "generate", "--model", str(pair), "--quick", "--json", "--tree", "9,2,3"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["eagle"]["prompts"] == len(set(seen)) == 4
    assert values["max_new_tokens"] == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "SmolLM3"], "unknown model"),
        (["--prompts", "no/such/file"], "cannot read the prompts in no/such/file"),
        (["--batch", "0"], "--batch is 0"),
        (["--num-runs", "-1"], "--num-runs is -1"),
        (["-n", "0"], "max_new_tokens is 0"),
        (["--limit", "0"], "the limit is 0"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert main(["bench", "generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_prompt_too_long_is_named_by_its_line(pair, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("short\n\n" + "x" * 600 + "\n")
    assert main(["bench", "generate", "--model", str(pair), "--prompts", str(path), "-n", "2"]) == 2
    assert f"prompt 2 ({path}, line 3) has " in capsys.readouterr().err


def test_a_bad_line_is_named(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    assert main(["bench", "generate", "--prompts", str(path)]) == 2
    assert f"{path}, line 2:" in capsys.readouterr().err


def test_an_out_that_is_a_file(pair, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    options = ["--model", str(pair), "--limit", "1", "-n", "2", "--tree", "9,2,3", "--out", str(taken)]
    assert main(["bench", "generate", *options]) == 2
    printed = capsys.readouterr()
    assert f"--out is {taken}, which is a file; give a folder's name" in printed.err
    assert "accept length" not in printed.out, "refused before anything is measured"


def test_a_write_that_fails_late_leaves_the_figures_on_the_screen(pair, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    options = ["--model", str(pair), "--limit", "1", "-n", "2", "--tree", "9,2,3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(Path, "write_text", full)
    assert main(["bench", "generate", *options]) == 2
    printed = capsys.readouterr()
    assert "accept length" in printed.out
    assert printed.err.splitlines()[-1].startswith(
        f"error: cannot write to {tmp_path / 'out'} (No space left on device)"
    )
