"""The command as a whole: errors, exit codes, quick help, and the small sub-commands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import tiny_target
from tiny_folder import save_pair

import eagle
from eagle import cli
from eagle.commands import doctor, generate
from eagle.errors import DownloadError
from eagle.model.ops import Ops
from eagle.model.presets import PRESETS
from eagle.model.triton_kernels.hardware import FlashAttention, Hardware


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"))


def fails(capsys, *arguments: str) -> str:
    """Run a command that must end with exit code 2, nothing on stdout and one line on stderr. → that line."""
    capsys.readouterr()  # what building the test's model printed
    code = cli.main(list(arguments))
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("error: ")
    return printed.err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{eagle.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["bench", "accept", "--help"], ["models"]])
def test_help_needs_no_torch(arguments):
    code = (
        "import sys; from eagle.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 10 * ('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_without_sub_command_help_is_shown(capsys, arguments):
    assert cli.main(arguments) == 0
    assert "Commands:" in capsys.readouterr().out


def test_models_lists_every_name(capsys):
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == list(PRESETS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["generate"], ["PROMPT"]),
        (["generate", "--foo", "hi"], ["--foo", "generate --help"]),
        (["generate", "Hello", "there"], ["2 arguments", "quotes", 'eagle generate "Hello there"']),
        (["generate", "-n", "5", 'Say "x"', "for", "$5"], ["3 arguments", "eagle generate 'Say \"x\" for $5'"]),
        (["generate", "--top-k", "many", "hi"], ["--top-k", "valid int"]),
        (["generate", "--kernels", "fast", "hi"], ["fast", "triton"]),
        (["generate", ""], ["empty"]),
        (["generate", " \n"], ["empty"]),
        (["generate", "\udcff"], ["UTF-8"]),
        (["generate", "--max-new-tokens", "0", "hi"], ["0", "at least 1"]),
        (["generate", "--max-new-tokens", "-5", "hi"], ["-5", "at least 1"]),
        (["generate", "--temperature", "-0.5", "hi"], ["-0.5", "greedy"]),
        (["generate", "--temperature", "nan", "hi"], ["nan"]),
        (["generate", "--top-p", "1.5", "hi"], ["1.5", "0 to 1"]),
        (["generate", "--top-k", "-1", "hi"], ["-1"]),
        (["generate", "--tree", "60,7", "hi"], ["60,7", "TOTAL,DEPTH,TOPK", "total_token, depth and top_k", "60,7,10"]),
        (["generate", "--tree", "a,b,c", "hi"], ["a,b,c"]),
        (["generate", "--tree", "1,7,10", "hi"], ["total_token", "1"]),
        (["generate", "--tree", "60,-1,10", "hi"], ["depth", "-1"]),
        (["generate", "--tree", "60,7,0", "hi"], ["top_k", "0"]),
        (["generate", "--tree", "60,1,2", "hi"], ["60", "7"]),
        (["generate", "--model", "SmolLM2-135N", "hi"], ["SmolLM2-135N", "SmolLM2-135M"]),
        (["generate", "--model", "gpt2", "hi"], ["'gpt2'", "eagle models"]),
        (["generate", "--model", "./nowhere", "hi"], ["nowhere"]),
        (["chat", "--max-new-tokens", "0"], ["at least 1"]),
        (["chat", "--temperature", "-1"], ["-1"]),
        (["bench", "accept", "--limit", "0"], ["0", "at least 1"]),
        (["bench", "accept", "--batch", "0"], ["0", "at least 1"]),
        (["bench", "accept", "--prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["train"], ["--model"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_gets_one_line_and_exit_code_2(capsys, arguments, words):
    line = fails(capsys, *arguments).lower()
    for word in words:
        assert word.lower() in line


def test_bad_input_that_needs_the_model(capsys, pair, tmp_path):
    model = ["--model", str(pair)]
    assert "512 tokens" in fails(capsys, "generate", *model, "--raw", "x" * 511 + "y")
    assert "60 tokens" in fails(capsys, "generate", *model, "--tree", "80,1,61", "hi")
    assert "head" in fails(capsys, "generate", *model, "--draft", str(tmp_path), "hi")
    (tmp_path / "target").mkdir()
    assert "config.json" in fails(capsys, "generate", "--model", str(tmp_path), "hi")


@pytest.mark.parametrize("part", ["target", "head"])
def test_damaged_weights(capsys, tmp_path, part):
    weights = save_pair(tmp_path) / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert part in fails(capsys, "generate", "--model", str(tmp_path), "hi")


def test_head_of_another_target(capsys, pair, tmp_path):
    tiny_target(vocab_size=31).save_pretrained(tmp_path)
    line = fails(capsys, "generate", "--model", str(tmp_path), "--draft", str(pair / "head"), "hi")
    assert "31" in line
    assert "259" in line


def test_model_without_tokenizer(capsys, tmp_path):
    assert "tokenizer" in fails(capsys, "generate", "--model", str(save_pair(tmp_path, tokenizer=False)), "hi")


def test_kernels_come_from_the_environment(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in fails(capsys, "generate", "--kernels", "triton", "hi")
    monkeypatch.setenv("EAGLE_KERNELS", "triton")
    assert "EAGLE_KERNELS" in fails(capsys, "generate", "hi")
    assert cli.main(["doctor"]) == 1
    assert "unset EAGLE_KERNELS" in capsys.readouterr().out
    monkeypatch.setenv("EAGLE_KERNELS", "wrong")
    assert "wrong" in fails(capsys, "generate", "hi")


def test_kernels_of_single_ops_come_from_the_environment(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("EAGLE_KERNELS_LINEAR", "triton")
    assert "EAGLE_KERNELS_LINEAR" in fails(capsys, "generate", "hi")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["doctor", "--json"]) == 0
    ops = json.loads(capsys.readouterr().out)["ops"]
    assert ops["linear"]["implementation"].startswith("triton")
    assert "as asked for this op" in ops["linear"]["why"]
    assert ops["rms_norm"]["implementation"] == "torch"
    monkeypatch.setenv("EAGLE_KERNELS_LINAER", "torch")
    assert "EAGLE_KERNELS_LINAER" in fails(capsys, "generate", "hi")


def _raising(error: BaseException):
    def encode_prompt(*args, **kwargs):
        raise error

    return encode_prompt


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (DownloadError("two\nlines"), 2),
        (torch.OutOfMemoryError("tried to allocate"), 2),
    ],
)
def test_exit_codes(capsys, monkeypatch, pair, error, code):
    monkeypatch.setattr(generate, "encode_prompt", _raising(error))
    assert cli.main(["generate", "--model", str(pair), "hi"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == (1 if code == 2 else 0)


@pytest.mark.parametrize(
    ("terminals", "ended"), [((True, True), "out"), ((False, True), "err"), ((False, False), None)]
)
def test_ctrl_c_ends_the_line_on_a_terminal(capsys, monkeypatch, terminals, ended):
    def interrupted(*args):
        generate.write("Hello th")
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "open_model", interrupted)
    for stream, is_terminal in zip((sys.stdout, sys.stderr), terminals, strict=True):
        monkeypatch.setattr(stream, "isatty", lambda answer=is_terminal: answer)
    assert cli.main(["generate", "hi"]) == 130
    printed = capsys.readouterr()
    assert printed.out == "Hello th" + "\n" * (ended == "out")
    assert printed.err == "\n" * (ended == "err")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_can_not_be_written_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "eagle.cli", "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the output (No space left on device); send it elsewhere\n"


def test_doctor_names_a_cache_that_is_no_folder(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "file"))
    assert cli.main(["doctor"]) == 1
    assert "is a file" in capsys.readouterr().out


def test_doctor_names_a_wheel_that_is_no_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path))
    monkeypatch.setenv("EAGLE_SMOLLM2_WHEEL", "/nope.whl")
    assert cli.main(["doctor"]) == 1
    assert "EAGLE_SMOLLM2_WHEEL is '/nope.whl', which is no file" in " ".join(capsys.readouterr().out.split())


def test_doctor_names_a_table_that_is_no_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path))
    monkeypatch.setenv("EAGLE_TUNED", "/nope.json")
    fatal = torch.cuda.is_available()  # elsewhere nothing reads it
    assert cli.main(["doctor"]) == int(fatal)
    assert "/nope.json" in capsys.readouterr().out


def test_a_bug_is_not_dressed_up_as_a_mistake(monkeypatch, pair):
    monkeypatch.setattr(generate, "encode_prompt", _raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["generate", "--model", str(pair), "hi"])


def test_fetch_passes_its_flags_on(capsys, monkeypatch, tmp_path):
    asked = {}

    def fetch(name, out, *, ea_model_path):
        asked.update(name=name, out=out, draft=ea_model_path)
        return [tmp_path / "target", tmp_path / "head"]

    monkeypatch.setattr("eagle.model.fetch.fetch", fetch)
    assert cli.main(["fetch", "a-name", "--out", str(tmp_path), "--draft", "org/head"]) == 0
    assert asked == {"name": "a-name", "out": tmp_path, "draft": "org/head"}
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "target"), str(tmp_path / "head")]


def test_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path))
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_run"] is True
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert list(report["ops"]) == [op.name for op in fields(Ops)]
    assert all(entry["implementation"] and entry["why"] for entry in report["ops"].values())
    assert report["cache"]["folder"] == str(tmp_path)
    assert report["cache"]["default_model_present"] is False
    assert any("eagle fetch" in entry["fix"] for entry in report["problems"])
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert set(report["running"]) == {"step", "tuned"}
    assert "flash-attn" in report["versions"]
    if not torch.cuda.is_available():
        assert report["running"]["step"] == "op by op: a capture needs an NVIDIA GPU, not cpu"
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed
    assert "eagle fetch" in printed


@pytest.mark.parametrize(
    ("gpu", "tuned"), [("NVIDIA H200", "NVIDIA H100 80GB HBM3"), ("NVIDIA L40S", "none: by rule")], ids=["H200", "L40S"]
)
def test_doctor_on_a_gpu_tells_how_steps_run(gpu, tuned, monkeypatch):
    flash = FlashAttention("flash_attn", "2.8.3", "flash_attn does not import (undefined symbol)")
    found = Hardware("cuda", gpu, (9, 0), flash=flash)
    monkeypatch.setattr("eagle.model.triton_kernels.hardware.default_hardware", lambda: found)
    running, problems = doctor.run_report(doctor.op_report())
    assert running["step"].startswith("captured")
    assert tuned in running["tuned"]
    assert "FlashAttention 2.8.3 can't be used: flash_attn does not import" in problems[0]["problem"]
    assert not problems[0]["fatal"]
    assert doctor.run_report({"linear": {"implementation": "torch"}})[0]["step"].startswith("op by op")


@pytest.mark.parametrize(
    ("implementations", "words"),
    [
        (["sdpa", "torch"], "PyTorch itself"),
        (["flash (prompts), triton (steps)", "torch"], "optimize_eagle_with_triton"),
    ],
)
def test_doctor_says_what_its_list_is(capsys, implementations, words):
    report = doctor.diagnose()
    report["ops"] = {f"op{index}": {"implementation": name, "why": "…"} for index, name in enumerate(implementations)}
    doctor.print_report(report)
    heading = next(line for line in capsys.readouterr().out.splitlines() if "each operation" in line)
    assert words in heading


def test_doctor_names_a_broken_table(monkeypatch, tmp_path):
    monkeypatch.setenv("EAGLE_TUNED", str(tmp_path / "none.json"))
    monkeypatch.setattr(
        "eagle.model.triton_kernels.hardware.default_hardware", lambda: Hardware("cuda", "NVIDIA Nobody", (9, 0))
    )
    _, problems = doctor.run_report({})
    assert "none.json" in problems[0]["problem"]
    assert "EAGLE_TUNED" in problems[0]["fix"]


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", {"torch": "2.9.1+cpu", "transformers": None}.get)
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["can_run"] is False
    fixes = " ".join(entry["fix"] for entry in report["problems"] if entry["fatal"])
    assert "torch>=2.11" in fixes
    assert "transformers>=5.17" in fixes
