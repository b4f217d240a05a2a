"""integration_test.py: its checks pass on a sound model and each of them can fail."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle
from tiny_folder import save_pair

from eagle.bench import integration
from eagle.bench.integration import FAIL, PASS, SKIP, Bench, Difference, kernels_in_use, run_checks
from eagle.bench.memory import held_bytes
from eagle.cli import run
from eagle.commands.integration_test import app, parting_lines
from eagle.model.ops import Sampling
from eagle.model.torch_ops import TORCH_OPS

ON_GPU = torch.cuda.is_available()
SCRIPT = Path(__file__).resolve().parent.parent / "integration_test.py"
TOKENS = 9
OPTIMISED = "optimised equals original"
EQUALS_PLAIN = "EAGLE equals plain, original"
BATCH = "a batch equals its rows"
SEEDED = "sampling is seeded"
STREAMING = "streaming equals non-streaming"
RESTORED = "restore gives the original back"
MEMORY = "memory returns to where it was"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(9)
    return save_pair(tmp_path_factory.mktemp("pair"))


def bench(**target) -> Bench:
    sizes = {"vocab_size": 29, **target}
    return Bench(tiny_eagle(**sizes), [3, 4, 5, 6], [[7], [1, 2, 3, 4, 5, 6]], TOKENS, 2)


def states(checks) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def failed(found: Bench) -> set[str]:
    return {name for name, state in states(run_checks(found)).items() if state == FAIL}


def wrong_attention(q, *args, **kwargs):
    return TORCH_OPS.attention(q, *args, **kwargs) * -3.0


def serve_wrongly(monkeypatch):
    right, table = integration.optimize_eagle_with_triton, TORCH_OPS.replaced(attention=wrong_attention)
    monkeypatch.setattr(integration, "optimize_eagle_with_triton", lambda model: right(model, ops=table))


def test_a_sound_model_passes():
    found, told = bench(), []
    before = found.model.ops
    checks = list(run_checks(found, lambda *what: told.append(what)))
    assert set(states(checks).values()) == {PASS}
    assert len(checks) == 9
    assert all(check.reason and not check.differences for check in checks)
    assert [done for _, done, _ in told] == list(range(9))
    assert found.model.ops == before


@pytest.mark.skipif(ON_GPU, reason="for the interpreter")
def test_kernels_pass_too(monkeypatch):
    for op in ("RMS_NORM", "SWIGLU"):
        monkeypatch.setenv(f"EAGLE_KERNELS_{op}", "triton")
    found = bench()
    found.new_tokens, found.runs = 3, 1
    assert kernels_in_use(found.model)[0] == ["rms_norm", "swiglu"]
    assert failed(found) == set()


def test_without_kernels_the_reason_is_told():
    served, why = kernels_in_use(tiny_eagle())
    assert served == []
    assert why


def test_a_kernel_that_is_wrong(monkeypatch):
    serve_wrongly(monkeypatch)
    found = bench()
    checks = {check.name: check for check in run_checks(found)}
    assert checks[OPTIMISED].state == FAIL
    assert "part at new token" in checks[OPTIMISED].reason
    [difference] = checks[OPTIMISED].differences
    assert difference.outputs == (tuple(found.original), tuple(found.optimised))
    # It is wrong both ways, and restored; the rest still holds.
    assert {name for name, check in checks.items() if check.state == FAIL} == {OPTIMISED}


def test_in_16_bits_another_arithmetic_may_part_but_never_passes(monkeypatch):
    serve_wrongly(monkeypatch)
    found = bench(dtype=torch.bfloat16)
    found.model.base_model.to(torch.bfloat16)
    assert not found.exact
    check = next(check for check in run_checks(found) if check.name == OPTIMISED)
    assert check.state == SKIP
    assert "near-tie" in check.reason


def test_a_restore_that_does_not(monkeypatch):
    serve_wrongly(monkeypatch)
    monkeypatch.setattr(integration, "restore_eagle", lambda model, originals: model)
    assert RESTORED in failed(bench())


def test_steps_that_differ_from_the_whole():
    found = bench()
    right = found.stream
    found.stream = lambda prompts, seed=None: [[*row[:-1], 1 - row[-1]] for row in right(prompts, seed)]
    assert {STREAMING, BATCH} <= failed(found)


def test_a_batch_that_mixes_its_rows():
    found = bench()
    right = found.stream
    found.stream = lambda prompts, seed=None: right(prompts, seed)[:: -1 if len(prompts) > 1 else 1]
    assert failed(found) == {BATCH}


def test_a_draft_that_changes_the_output(monkeypatch):
    found = bench()
    right = found.generate
    found.generate = lambda prompt=None, speculative=True: right(prompt, speculative=speculative)[
        : TOKENS - speculative
    ]
    assert EQUALS_PLAIN in failed(found)


def test_seeds_that_do_nothing():
    found = bench()
    stream = found.model.stream
    found.model.stream = lambda *args, **kwargs: stream(*args, **{**kwargs, "seed": None, "sampling": Sampling()})
    assert failed(found) == {SEEDED}


def test_seeds_that_do_not_repeat():
    found = bench()
    stream = found.model.stream
    found.model.stream = lambda *args, **kwargs: stream(*args, **{**kwargs, "seed": None})
    assert failed(found) == {SEEDED}


def test_memory_that_stays(monkeypatch):
    kept, right = [], integration.optimize_eagle_with_triton

    def leaking(model):
        kept.append(torch.zeros(1 << 20))
        return right(model)

    monkeypatch.setattr(integration, "optimize_eagle_with_triton", leaking)
    assert failed(bench()) == {MEMORY}


def test_held_memory_counts_storages_once():
    device = torch.device("cpu")
    gc.collect()
    before = held_bytes(device)
    big = torch.zeros(1000, 1000)
    views = [big[:10], big.view(-1), torch.nn.Parameter(big)]
    assert held_bytes(device) - before == 4_000_000
    del big, views
    assert held_bytes(device) == before


def test_where_two_texts_part(pair):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    one, other = (tuple(tokenizer(text)["input_ids"]) for text in ("same end", "same here"))
    shown = list(parting_lines(tokenizer, Difference(("original", "optimised"), (one, other))))
    assert "'same '" in shown[0]
    assert "'end'" in shown[1]
    assert "'here'" in shown[2]
    shown = list(parting_lines(tokenizer, Difference(("original", "optimised"), (one, one[:3]))))
    assert shown[2] == "optimised goes on with nothing more"


def test_the_command(pair, capsys):
    options = ["--model", str(pair), "--prompt", "Hi", "--max-length", "45", "--num-runs", "2", "--tree", "9,2,3"]
    assert run(app, "integration_test.py", [*options, "--verbose"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("PASS  ") == 9
    assert "9 checks: 9 passed, 0 failed, 0 skipped" in printed.out
    assert "float32" in printed.out
    assert "\noriginal:\n" in printed.out
    assert "\noptimised:\n" in printed.out
    assert ("same PyTorch ops" in printed.err) is not ON_GPU


def test_a_failure_is_exit_code_1(pair, capsys, monkeypatch):
    serve_wrongly(monkeypatch)
    options = ["--model", str(pair), "--prompt", "Hi", "--max-length", "45", "--num-runs", "1", "--tree", "9,2,3"]
    assert run(app, "integration_test.py", [*options, "--verbose"]) == 1
    printed = capsys.readouterr().out
    assert f"FAIL  {OPTIMISED}" in printed
    assert "goes on with token" in printed
    assert "1 failed" in printed


def test_mistakes_get_one_line(capsys):
    for arguments, words in (
        (["--model", "SmolLM3"], "unknown model"),
        (["--num-runs", "-2"], "--num-runs is -2"),
        (["--dtype", "int4"], "int4"),
    ):
        assert run(app, "integration_test.py", arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_the_script_itself():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0
    assert "--verbose" in done.stdout
