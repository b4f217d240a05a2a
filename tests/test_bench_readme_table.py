"""README's benchmark table is what the script makes of the committed report, and the script makes it right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle.bench import readme_table
from eagle.bench.readme_table import BEGIN, END, main, source_of, tables, with_tables
from eagle.bench.report import read_content
from eagle.errors import InvalidInputError

ROOT = Path(__file__).resolve().parent.parent


def test_readme_shows_the_committed_report():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = source_of(readme)
    if source is None:
        pytest.fail("README has no benchmark table; python -m eagle.bench.readme_table makes it from a report")
    made = tables(read_content(ROOT / source), source.as_posix())
    assert readme == with_tables(readme, made), f"run: python -m eagle.bench.readme_table {source}"


def figures(tokens_per_second: float, step_seconds: float, accept: float) -> dict:
    return {
        "tokens_per_second": tokens_per_second,
        "step_seconds_median": step_seconds,
        "accept_length": accept,
        "prompts": 8,
    }


def content(gpu: bool = True) -> dict:
    generate = {
        "dtype": "bfloat16",
        "tree": [60, 7, 10],
        "max_new_tokens": 128,
        "identical": 8,
        "speedup": 2.5,
        "eagle": figures(500.4, 0.00521, 2.913),
        "plain": figures(200.2, 0.005, 1.0),
    }
    rows = [
        {"decoding": "EAGLE", "ops": "as loaded", "floor_ms": 9.0},
        {"decoding": "plain", "ops": "as loaded", "floor_ms": 8.0},
        {"decoding": "EAGLE", "ops": "optimised", "floor_ms": 4.006},
        {"decoding": "plain", "ops": "optimised", "floor_ms": 3.0},
    ]
    peer = {"engine": "vllm", "version": "0.26.0", "setting": "plain", "state": "measured", "tokens_per_second": 153.4}
    peer |= {"step_ms": 6.5, "accept_length": 1.0, "identical": None, "prompts": 8}
    absent = peer | {"engine": "sglang", "state": "absent"}
    peers = {"prompts": 8, "max_new_tokens": 64, "rows": [peer, absent]}
    return {
        "format": 1,
        "device": "NVIDIA H100" if gpu else "CPU (2 threads)",
        "gpu": gpu,
        "runs": [
            {"date": f"2026-11-{day}T10:00:00+00:00", "torch": "2.11.0", "triton": triton, "parts": parts}
            for day, triton, parts in (
                (22, "3.6.0", ["generate", "roofline"]),
                (23, None, ["generate"]),
                (24, "3.6.0", ["peers"]),
            )
        ],
        "kernels": None,
        "models": {
            "EAGLE-8B": {"parts": {"generate": generate, "roofline": {"rows": rows}, "peers": peers}},
            "bare": {"parts": {"generate": generate, "roofline": {"error": "RuntimeError: x"}}},
            "failed": {"parts": {"generate": {"error": "RuntimeError: x"}}},
        },
    }


def test_the_figures_land_in_their_columns():
    made = tables(content(), "docs/benchmarks/h100/report.json")
    assert "| EAGLE-8B | 200 | 500 | 2.50x | 5.21 | 4.01 | 2.91 | 8 of 8 |" in made
    assert "| bare | 200 | 500 | 2.50x | 5.21 | – | 2.91 | 8 of 8 |" in made
    assert "failed" not in made
    assert "| EAGLE-8B | vllm 0.26.0 | plain | 153 | 6.50 | 1.00 | – |" in made
    assert "sglang" not in made
    assert "NVIDIA H100, 2026-11-22, 2026-11-23, torch 2.11.0, triton 3.6.0, None: 8 prompts" in made
    assert (
        "(8 prompts, at most 64 new tokens each, prefill in the times; 2026-11-24, torch 2.11.0, triton 3.6.0)" in made
    )
    assert "8 prompts, at most 128 new tokens each, bfloat16, tree 60/7/10" in made
    assert source_of(f"a\n{BEGIN}\n{made}\n{END}\n") == Path("docs/benchmarks/h100/report.json")


def test_a_cpu_is_marked():
    assert "figures of a CPU" in tables(content(gpu=False), "docs/r.json")
    assert "figures of a CPU" not in tables(content(), "docs/r.json")


def test_only_what_is_between_the_marks_changes():
    readme = f"before\n{BEGIN}\nold | table\n{END}\nafter\n"
    assert with_tables(readme, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert with_tables(with_tables(readme, "x"), "new") == with_tables(readme, "new")
    assert source_of(readme) is None
    assert source_of("nothing") is None
    for bad in ("nothing", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(InvalidInputError, match="each once"):
            with_tables(bad, "new")


def test_a_report_without_generations():
    empty = content() | {"models": {}}
    with pytest.raises(InvalidInputError, match="holds no generations"):
        tables(empty, "docs/r.json")


def test_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme_table, "README", tmp_path / "README.md")
    readme, report = tmp_path / "README.md", tmp_path / "docs" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps(content()))
    readme.write_text(f"# X\n{BEGIN}\n{END}\nend\n")
    assert main([str(report)]) == 0
    text = readme.read_text()
    assert "| EAGLE-8B | 200 |" in text
    assert "(docs/report.md)" in text
    assert text.endswith(f"{END}\nend\n")
    readme.write_text("# X\n")
    assert main([str(report)]) == 2
    assert "each once" in capsys.readouterr().err
    assert main([]) == 2
    assert main([str(tmp_path.parent / "elsewhere.json")]) == 2
    assert "README can only link to a file inside" in capsys.readouterr().err
