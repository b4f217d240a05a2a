"""README's table, made from a report and from nothing else: ``python -m eagle.bench.readme_table
docs/benchmarks/<folder>/report.json`` rewrites what stands between the two marks."""

from __future__ import annotations

import sys
from pathlib import Path

from eagle.bench.report import Content, read_content
from eagle.bench.report_markdown import table
from eagle.bench.report_summary import HEAD, generations, summary_rows
from eagle.bench.report_tables import CPU_MARK
from eagle.errors import EagleError, InvalidInputError

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"
PEER_HEAD = ["model", "engine", "setting", "tokens/s", "ms a step", "accept length", "equal to its own plain output"]


def tables(content: Content, path: str) -> str:
    """The part of README that ``content`` gives. path: of the report, as README links to it.

    Raises InvalidInputError for a report without generations.
    """
    rows = summary_rows(content)
    if not rows:
        raise InvalidInputError(f"{path} holds no generations; make it with 'eagle bench report --parts generate'")
    told: dict[str, list[str]] = {}
    for name, result in generations(content).items():
        tree = "/".join(map(str, result["tree"]))
        asked = _prompts(result["eagle"]["prompts"], result)
        told.setdefault(f"{asked}, {result['dtype']}, tree {tree}", []).append(name)
    runs = [f"{what} ({', '.join(names)})" for what, names in told.items()]
    where = (
        f"{content['device']}, {_runs(content, 'generate')}: "
        f"{'; '.join(runs)}; greedy, one prompt at a time, prefill "
        f"included. Floor: the time in which a step's bytes can be read, at the "
        f"bandwidth measured in the same run. [The whole report]({Path(path).with_suffix('.md').as_posix()})."
    )
    parts = [*([] if content["gpu"] else [f"**{CPU_MARK}**"]), where, table(HEAD, rows)]
    if peers := _peers(content):
        parts += [f"Beside other engines, on the same folders and prompts ({_peer_settings(content)}):"]
        parts += [table(PEER_HEAD, peers)]
    return "\n\n".join(parts)


def _prompts(count: int, part: Content) -> str:
    return f"{count} prompts, at most {part['max_new_tokens']} new tokens each"


def _peer_settings(content: Content) -> str:
    found = [entry["parts"].get("peers", {}) for entry in content["models"].values()]
    told = dict.fromkeys(_prompts(part["prompts"], part) for part in found if part.get("rows"))
    return f"{'; '.join(told)}, prefill in the times; {_runs(content, 'peers')}"


def _runs(content: Content, part: str) -> str:
    """When, and with what, a part was measured: each value once."""
    runs = [run for run in content["runs"] if part in run["parts"]]
    found = {name: ", ".join(sorted({str(run[name]) for run in runs})) for name in ("torch", "triton")}
    dates = ", ".join(sorted({run["date"][:10] for run in runs}))
    return f"{dates}, torch {found['torch']}, triton {found['triton']}"


def _peers(content: Content) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{row['engine']} {row['version'] or ''}".strip(),
            row["setting"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['step_ms']:.2f}" if row["step_ms"] else "–",
            f"{row['accept_length']:.2f}" if row["accept_length"] else "–",
            "–" if row["identical"] is None else f"{row['identical']} of {row['prompts']}",
        )
        for name, entry in content["models"].items()
        for row in entry["parts"].get("peers", {}).get("rows", [])
        if row["state"] == "measured"
    ]


def with_tables(readme: str, made: str) -> str:
    """``readme`` with ``made`` between the marks. Raises InvalidInputError where they are missing or in disorder."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise InvalidInputError(f"expected {BEGIN} and, after it, {END} in README.md, each once; put them in")
    before, after = readme[: readme.index(BEGIN)], readme[readme.index(END) :]
    return f"{before}{BEGIN}\n{made}\n{after}"


def source_of(readme: str) -> Path | None:
    """The report.json that README's table links to, relative to README; None without a table."""
    between = readme.partition(BEGIN)[2].partition(END)[0]
    link = between.partition("[The whole report](")[2].partition(")")[0]
    return Path(link).with_suffix(".json") if link else None


def main(arguments: list[str]) -> int:
    """Rewrite README.md. → exit code."""
    if len(arguments) != 1:
        print("usage: python -m eagle.bench.readme_table docs/benchmarks/<folder>/report.json", file=sys.stderr)
        return 2
    path = Path(arguments[0]).resolve()
    try:
        if not path.is_relative_to(README.parent):
            raise InvalidInputError(f"{path} is outside of {README.parent}; README can only link to a file inside")
        content = read_content(path)
        made = tables(content, path.relative_to(README.parent).as_posix())
        README.write_text(with_tables(README.read_text(encoding="utf-8"), made), encoding="utf-8")
    except EagleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote the benchmark table of {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
