"""README and docs keep their word: README's Python runs, all commands parse, the files exist."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import typer
from tiny_folder import save_pair

from eagle.cli import app
from eagle.model.ea_model import EaModel
from eagle.model.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = PAGES[ROOT / "docs" / "commands.md"]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def eagle_lines() -> list[str]:
    """Every `eagle ...` command of the shell blocks, each once."""
    lines = [line for page in PAGES.values() for block in blocks("sh", page) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return list(dict.fromkeys(part for part in parts if part.startswith("eagle ")))


@pytest.fixture
def tiny_models(monkeypatch, tmp_path):
    """Whatever model a snippet names, a tiny one is loaded."""
    pair = str(save_pair(tmp_path))
    original = EaModel.from_pretrained.__func__

    def from_pretrained(cls, name=None, *, base_model_path=None, ea_model_path=None, **options):
        assert (name is None) != (base_model_path is None)
        return original(cls, pair, **options)

    monkeypatch.setattr(EaModel, "from_pretrained", classmethod(from_pretrained))


@pytest.mark.parametrize("snippet", blocks("python"), ids=["ten-lines", "own-pair", "kernels"])
def test_snippets_run(tiny_models, snippet, capsys):
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert isinstance(names["model"], EaModel)
    for code, shown in (("accept_length", "accept length"), ("kernel_report", "evaluate_posterior: torch")):
        if code in snippet:
            assert shown in capsys.readouterr().out


@pytest.mark.parametrize("line", eagle_lines())
def test_commands_parse(line):
    command, arguments = typer.main.get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(name, arguments)
    model = context.params.get("model") or context.params.get("name")
    assert model is None or model in PRESETS or model == "path/to/target"


def test_the_two_first_commands():
    assert blocks("sh")[0] == 'pip install -e . && eagle generate --compare "Explain gravity in two sentences."\n'
    assert blocks("sh")[1] == "./run_tests.sh\n"
    assert os.name == "nt" or (ROOT / "run_tests.sh").stat().st_mode & 0o111


def test_the_table_lists_every_command():
    listed = set(re.findall(r"^\| `eagle (bench \w+|\w+)", COMMANDS, re.MULTILINE))
    command = typer.main.get_command(app)
    there = set(command.commands) - {"bench"} | {f"bench {name}" for name in command.commands["bench"].commands}
    assert listed == there


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", PAGES[page]):
        path, _, anchor = name.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), name


def test_files_and_counts():
    for name in re.findall(r"(?<![\w/])\w+\.(?:py|sh|ps1)\b", README + COMMANDS):
        assert (ROOT / name).exists(), name
    pairs = sum(preset.origin == "hub" for preset in PRESETS.values())
    assert f"lists {pairs} published pairs" in README


def test_environment_variables_are_read_somewhere():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "eagle").rglob("*.py"))
    for name in re.findall(r"`(EAGLE_\w+)`", README + COMMANDS):
        assert name in sources
