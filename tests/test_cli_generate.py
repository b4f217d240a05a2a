"""`eagle generate` on tiny models, and the decoding of tokens as they come."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import byte_tokenizer, save_pair

from eagle.cli import main
from eagle.commands.reply import TextStream
from eagle.model.ea_model import EaModel

TREE = ["--tree", "12,2,4"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("bare"), template=None)


def run(capsys, *arguments: str) -> tuple[str, str]:
    """Standard output and error of a command that must succeed."""
    assert main([*arguments]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def run_json(capsys, *arguments: str) -> dict:
    return json.loads(run(capsys, "generate", *TREE, "--json", *arguments)[0])


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_text_stream_never_emits_half_a_character(step):
    tokenizer = byte_tokenizer()
    text = "naïve 你好 🙂🙂 – ß\n  end"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    stream = TextStream(tokenizer)
    pieces = [stream.put(ids[begin : begin + step]) for begin in range(0, len(ids), step)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text
    assert len(text) - len("".join(pieces[:-1])) <= step + 3  # it streams: little is ever held back


def test_text_stream_gives_a_broken_end_back():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é🙂")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.put([token]) for token in ids) == "é"
    assert stream.end() == tokenizer.decode(ids)[1:]


def test_text_then_figures(capsys, pair):
    out, err = run(capsys, "generate", "--model", str(pair), *TREE, "-n", "21", "--compare", "Hello")
    *text, figures, comparison = out.splitlines()
    wanted = run_json(capsys, "--model", str(pair), "-n", "21", "Hello")
    assert "\n".join(text).rstrip("\n") == "\n".join(wanted["text"].splitlines()).rstrip("\n")
    match = re.fullmatch(r"(\d+) new tokens, [\d.]+ s, [\d.]+ tokens/s, accept length ([\d.]+)", figures)
    assert match
    assert int(match[1]) == wanted["new_tokens"] <= 21
    assert float(match[2]) == pytest.approx(wanted["accept_length"], abs=0.006)
    assert re.fullmatch(r"plain decoding: [\d.]+ tokens/s, speed-up [\d.]+x, identical: yes", comparison)
    assert "untrained" not in err


def test_json_agrees_with_python(capsys, pair):
    model = EaModel.from_pretrained(str(pair), total_token=12, depth=2, top_k=4)
    tokenizer = model.get_tokenizer()
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    output = model.generate(ids, max_new_tokens=19)
    values = run_json(capsys, "--model", str(pair), "--max-new-tokens", "19", "Hello")
    assert values["text"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert values["new_tokens"] == output.shape[1] - ids.shape[1]
    assert values["steps"] == model.last_stats.steps
    assert values["accept_length"] == model.last_stats.accept_length
    assert values["tokens_per_second"] == pytest.approx(values["new_tokens"] / values["seconds"])
    assert set(values) == {"text", "new_tokens", "seconds", "tokens_per_second", "accept_length", "steps"}


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8", "--top-k", "20", "--top-p", "0.9"]])
def test_compare_as_json(capsys, pair, sampling):
    values = run_json(capsys, "--model", str(pair), "-n", "15", "--compare", *sampling, "Hello")
    assert values["identical"] is True
    assert values["plain_tokens_per_second"] > 0
    assert values["speedup"] == pytest.approx(values["tokens_per_second"] / values["plain_tokens_per_second"])


def test_seed_makes_sampling_repeatable(capsys, pair):
    command = ["--model", str(pair), "-n", "15", "--temperature", "1.2"]
    texts = [run_json(capsys, *command, "--seed", seed, "Hello")["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_difference_is_told(capsys, pair, monkeypatch):
    original = EaModel.stream

    def stream(self, *args, speculative=True, **kwargs):
        steps = original(self, *args, speculative=speculative, **kwargs)

        def changed():
            for index, new in enumerate(steps):
                yield [[new[0][0] ^ 1, *new[0][1:]]] if index == 3 and not speculative else new

        return changed()

    monkeypatch.setattr(EaModel, "stream", stream)
    out, _ = run(capsys, "generate", "--model", str(pair), *TREE, "-n", "9", "--compare", "Hello")
    assert out.splitlines()[-1].endswith("identical: no (first at new token 4)")
    options = ["--dtype", "bfloat16", "-n", "9", "--compare", "Hello"]
    out, _ = run(capsys, "generate", "--model", str(pair), *TREE, *options)
    assert out.splitlines()[-2].endswith("identical: no (first at new token 4)")
    assert out.splitlines()[-1].endswith("own modules; --dtype float32 decides")


def test_prompt_from_standard_input(capsys, pair, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    piped = run_json(capsys, "--model", str(pair), "-n", "9", "-")
    assert piped["text"] == run_json(capsys, "--model", str(pair), "-n", "9", "Hello")["text"]


def test_standard_input_that_is_no_text(capsys, pair, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert main(["generate", "--model", str(pair), "-"]) == 2
    assert "byte 2" in capsys.readouterr().err


def test_raw_leaves_the_template_out(capsys, pair):
    model = EaModel.from_pretrained(str(pair))
    ids = torch.tensor([model.get_tokenizer()("Hello")["input_ids"]])
    model.generate(ids, max_new_tokens=9)
    run(capsys, "generate", "--model", str(pair), *TREE, "-n", "9", "--raw", "Hello")
    raw = run_json(capsys, "--model", str(pair), "-n", "9", "--raw", "Hello")
    assert raw["text"] == model.get_tokenizer().decode(
        model.generate(ids, max_new_tokens=9)[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert raw["text"] != run_json(capsys, "--model", str(pair), "-n", "9", "Hello")["text"]


def test_no_template_is_said_once(capsys, bare):
    out, err = run(capsys, "generate", "--model", str(bare), *TREE, "-n", "5", "--json", "Hello")
    assert err.count("chat template") == 1
    assert json.loads(out)["new_tokens"] >= 1
    _, err = run(capsys, "generate", "--model", str(bare), *TREE, "-n", "5", "--raw", "Hello")
    assert "chat template" not in err


def test_an_untrained_head_is_told(capsys, pair):
    out, err = run(capsys, "generate", "--model", str(pair), "--draft", "random", *TREE, "-n", "5", "--json", "Hello")
    assert err.count("untrained") == 1
    assert json.loads(out)["new_tokens"] >= 1


def test_a_model_without_a_head(capsys, pair):
    assert main(["generate", "--model", str(pair / "target"), "Hello"]) == 2
    err = capsys.readouterr().err
    assert "--draft" in err
    assert "'random'" in err
    command = ["--model", str(pair / "target"), "--draft", str(pair / "head"), "-n", "9", "Hello"]
    assert run_json(capsys, *command)["text"] == run_json(capsys, "--model", str(pair), "-n", "9", "Hello")["text"]


def test_filters_without_temperature_are_told(capsys, pair):
    _, err = run(capsys, "generate", "--model", str(pair), *TREE, "-n", "5", "--top-k", "3", "Hello")
    assert "temperature 0" in err
