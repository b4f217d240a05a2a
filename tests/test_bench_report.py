"""`eagle bench report`: one report on disk after each part, complete or not, that says what failed and shows no time for
what is wrong."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tiny_folder import save_pair

from eagle.bench.report import failures, new_content, opened, read_content, record, save
from eagle.bench.report_html import bars_svg, html
from eagle.bench.report_markdown import markdown
from eagle.bench.report_tables import Bars, kernels_section
from eagle.cli import main
from eagle.commands.bench_report import parse_parts
from eagle.errors import EagleError, InvalidInputError

ON_GPU = torch.cuda.is_available()
QUICK = ["bench", "report", "--quick", "-n", "6", "--limit", "2", "--tree", "9,2,3"]
VOID = {"meta", "br", "link", "img"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(17)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch):
    monkeypatch.setattr("eagle.commands.bench_report._bandwidth", lambda device: 12.5)


def origin(device: str = "GPU X") -> dict:
    return {"device": device, "command": "eagle bench report", "date": "2026-01-02T03:04:05+00:00", "commit": None}


class Page(HTMLParser):
    """Checks that tags close in order, and collects texts and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.references = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_all_parts_of_a_model(pair, tmp_path, capsys):
    out = tmp_path / "out"
    parts = "accept,generate,roofline,sweep"
    assert main([*QUICK, "--models", str(pair), "--parts", parts, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "EAGLE, ms a step" in printed.out
    assert ("no GPU" in printed.err) is not ON_GPU
    content = read_content(out / "report.json")
    assert list(content["models"]) == [str(pair)]
    found = content["models"][str(pair)]["parts"]
    assert list(found) == ["generate", "roofline", "sweep", "accept"]
    assert found["generate"]["identical"] == found["generate"]["eagle"]["prompts"] == 2
    assert found["roofline"]["read_gb_per_second"] == 12.5
    assert [row["prompts"] for row in found["roofline"]["rows"]] == [1, 1]
    assert found["sweep"]["cells"][0]["best"] is not None
    assert found["accept"]["identical"] == 2
    [run] = content["runs"]
    assert run["complete"]
    assert run["torch"] == torch.__version__
    assert {"commit", "date", "platform", "triton", "transformers", "clocks_before", "clocks_after"} <= set(run)
    text, page = (out / "report.md").read_text(), Page((out / "report.html").read_text())
    assert page.references == []
    words = " ".join(page.texts)
    for title in (": generation", ": roofline", ": trees", ": acceptance"):
        assert title in text
        assert title in words
    assert ("figures of a CPU" in text) is ("figures of a CPU" in words) is not ON_GPU
    assert "<svg" in (out / "report.html").read_text()


def test_adding_models_one_by_one(pair, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--parts", "roofline"]
    assert main([*QUICK, "--models", f"{pair}, no/such/folder", *out]) == 2
    assert "no/such/folder" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists(), "a name that leads nowhere is refused before anything runs"
    assert main([*QUICK, "--models", f"{pair}, nobody/nothing", *out]) == 1
    assert "nobody/nothing" in capsys.readouterr().err
    content = read_content(tmp_path / "report.json")
    assert "nobody/nothing" in content["models"]["nobody/nothing"]["error"]
    assert "nobody/nothing" in (tmp_path / "report.md").read_text()
    assert main([*QUICK, "--models", "nobody/nothing", "--parts", "roofline", "--out", str(tmp_path / "none")]) == 2
    assert "error: nothing could be measured: nobody/nothing" in capsys.readouterr().err
    content["models"][str(pair)]["parts"]["generate"] = {"error": "RuntimeError: earlier"}
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert main([*QUICK, "--models", str(pair), "--add", *out]) == 0, "what earlier runs left does not fail this one"
    assert "RuntimeError: earlier" in (tmp_path / "report.md").read_text()
    content = read_content(tmp_path / "report.json")
    assert len(content["runs"]) == 2
    assert set(content["models"][str(pair)]["parts"]) == {"roofline", "generate"}
    capsys.readouterr()
    assert main([*QUICK, "--models", str(pair), *out]) == 0
    assert "is replaced; --add keeps" in capsys.readouterr().err
    assert len(read_content(tmp_path / "report.json")["runs"]) == 1


def test_what_is_cut_off_leaves_its_parts(pair, tmp_path, monkeypatch):
    def cut(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("eagle.bench.report_parts.measure_roofline", cut)
    assert main([*QUICK, "--models", str(pair), "--parts", "generate,roofline", "--out", str(tmp_path)]) == 130
    content = read_content(tmp_path / "report.json")
    assert list(content["models"][str(pair)]["parts"]) == ["generate"]
    assert not content["runs"][0]["complete"]
    assert "cut off, or still running" in (tmp_path / "report.md").read_text()
    assert ": generation" in (tmp_path / "report.html").read_text()


def test_a_part_that_fails_does_not_take_the_others_along(pair, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with …")

    monkeypatch.setattr("eagle.bench.report_parts.measure_prompts", fail)
    assert main([*QUICK, "--models", str(pair), "--parts", "generate,accept", "--out", str(tmp_path)]) == 1
    assert "generate failed: RuntimeError: CUDA error: an illegal memory access" in capsys.readouterr().err
    found = read_content(tmp_path / "report.json")["models"][str(pair)]["parts"]
    assert found["generate"] == {"error": "RuntimeError: CUDA error: an illegal memory access"}
    assert found["accept"]["identical"] == 2
    assert ": generation" not in (tmp_path / "report.md").read_text()


def test_peers_take_their_place(pair, tmp_path, monkeypatch):
    from eagle.bench.peers import ABSENT, FAILED, MEASURED, PeerRow

    rows = [
        PeerRow("vllm", "plain", MEASURED, "9.1", prompts=2, new_tokens=12, seconds=2.0, steps=10),
        PeerRow("sglang", "plain", ABSENT, reason="sglang is not installed in /python"),
    ]
    monkeypatch.setattr("eagle.bench.peers.measure_peers", lambda *_, **__: rows)
    command = [*QUICK, "--models", str(pair), "--parts", "peers", "--out", str(tmp_path)]
    assert main(command) == 0
    assert read_content(tmp_path / "report.json")["models"][str(pair)]["parts"]["peers"]["tree"] == [9, 2, 3]
    text = (tmp_path / "report.md").read_text()
    assert "| vllm 9.1 | plain | 6.0 | 200.00 | 1.00 |" in text
    assert "| sglang | plain | absent |" in text
    rows.append(PeerRow("sglang", "EAGLE", FAILED, reason="ValueError: no"))
    assert main(command) == 1
    assert failures(read_content(tmp_path / "report.json")) == [f"{pair}, sglang, EAGLE: ValueError: no"]


def kernel_row(**changes) -> dict:
    row = {
        "op": "linear",
        "label": "8B, 4096 × 4096",
        "dtype": "bfloat16",
        "state": "green",
        "reason": "",
        "error": 1e-3,
    }
    row |= {"us": 12.0, "rivals": {"torch": 18.0}, "gb_s": 2500.0, "share": 0.8}
    return row | changes


def test_a_red_kernel_has_no_time():
    red = kernel_row(state="red", reason="relative error 2.0", error="nan")
    section = kernels_section({"rows": [kernel_row(), red, kernel_row(state="not reached", us=None)], "summary": ["x"]})
    green, wrong = section.rows
    assert green[5:] == ("12.0", "18.0", "1.50×", "2500", "80%")
    assert wrong[3] == "RED: relative error 2.0"
    assert wrong[5:] == ("",) * 5
    assert len(section.bars[0].values) == 1
    content = new_content(origin(), True) | {"kernels": {"rows": [kernel_row(), red], "summary": []}}
    assert failures(content) == ["kernel linear, 8B, 4096 × 4096, bfloat16: relative error 2.0"]
    assert "12.0" not in next(line for line in markdown(content).splitlines() if "RED" in line)


def test_a_report_of_kernels(tmp_path, monkeypatch, capsys):
    result = {"rows": [kernel_row(us=None, rivals={}, share=None)], "summary": ["1 cases"], "ceilings": None}
    monkeypatch.setattr("eagle.bench.report_parts.kernels_part", lambda *_: result)
    assert main([*QUICK, "--parts", "kernels", "--out", str(tmp_path)]) == 0
    assert "- 1 cases" in (tmp_path / "report.md").read_text()
    assert read_content(tmp_path / "report.json")["models"] == {}


def test_kernels_really_run(monkeypatch):
    from eagle.bench import kernel_cases
    from eagle.bench.report_parts import kernels_part

    real = kernel_cases.select_cases
    monkeypatch.setattr(kernel_cases, "select_cases", lambda *_, **options: real(("rms_norm",), (), (), **options)[:2])
    result = kernels_part(torch.device("cuda" if ON_GPU else "cpu"), None, lambda *_: None)
    assert [row["state"] for row in result["rows"]] in (["green"] * 2, ["skipped"] * 2, ["green", "skipped"])
    json.dumps(result, allow_nan=False)


def test_texts_are_escaped_everywhere():
    content = new_content(origin("<GPU & co|1>"), True)
    content["models"]["a<b"] = {"parts": {}, "error": "<script>alert(1)</script>"}
    page = Page(html(content))
    assert "a<b: <script>alert(1)</script>" in page.texts
    assert "<script>" not in html(content)
    assert "<GPU & co\\|1>" in markdown(content)
    assert "&lt;x&gt;" in bars_svg(Bars("t", "", [("<x>", 1.0, None)]))


def test_bars_are_in_proportion_and_never_beyond_the_plot():
    svg = bars_svg(Bars("t", "ms", [("a", 2.0, None), ("b", 8.0, 16.0), ("c", 0.0, None)]))
    assert [part.split('"')[0] for part in svg.split("<rect ")[1:] for part in [part.split('width="')[1]]] == [
        "52.5",
        "210.0",
        "0.0",
    ]
    assert 'x1="720.0"' in svg
    assert bars_svg(Bars("nothing", "", [])).startswith("<svg")


def test_reports_of_two_devices_are_not_mixed(tmp_path):
    save(new_content(origin("GPU X"), True), tmp_path)
    with pytest.raises(InvalidInputError, match="was measured on GPU X, this is GPU Y"):
        opened(tmp_path, origin("GPU Y"), True, add=True)
    assert opened(tmp_path, origin("GPU Y"), True, add=False)["device"] == "GPU Y"
    assert opened(tmp_path / "new", origin("GPU Y"), True, add=True)["models"] == {}


def test_reports_that_are_none(tmp_path):
    path = tmp_path / "report.json"
    for text, words in (("{", "is not valid JSON"), ("[]", "is no report of format"), ('{"format": 0}', "format 1")):
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=words):
            read_content(path)
    with pytest.raises(InvalidInputError, match="cannot read the report"):
        read_content(tmp_path / "nowhere.json")


def test_a_folder_that_is_a_file(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    content = new_content(origin(), True)
    record(content, "m", "generate", {"error": "e"})
    with pytest.raises(EagleError, match="cannot write to"):
        save(content, taken)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "generate,speed"], "--parts names speed; expected some of kernels,generate"),
        (["--parts", ","], "--parts is empty"),
        (["--models", " , "], "--models names no model"),
        (["--limit", "0"], "--limit is 0"),
        (["--peer-timeout", "-1"], "--peer-timeout is -1"),
        (["--peer-python", "x"], "--peer-python is 'x'"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert main(["bench", "report", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_bad_line_is_named(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n{"turns": []}\n')
    assert main(["bench", "report", "--prompts", str(path)]) == 2
    assert f"{path}, line 3:" in capsys.readouterr().err


def test_parts_run_in_their_order():
    assert parse_parts("sweep, generate", with_peers=True) == ("generate", "sweep", "peers")
