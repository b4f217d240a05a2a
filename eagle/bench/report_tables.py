"""What a report shows, as tables: from its JSON values to texts, the same ones for the screen, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from eagle.bench.report import Content, failures
from eagle.bench.report_summary import HEAD, generations, summary_rows

CPU_MARK = "No GPU was there: these are the figures of a CPU, which say little about a GPU's."


@dataclass(frozen=True)
class Bars:
    """A bar chart: labelled values in one unit, each with a mark (a floor, say) or None."""

    title: str
    unit: str
    values: list[tuple[str, float, float | None]]


@dataclass(frozen=True)
class Section:
    """A heading with one table."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    bars: Sequence[Bars] = field(default=())


def sections(content: Content) -> Iterator[Section]:
    """All that a report holds, in order."""
    if rows := summary_rows(content):
        speeds = [
            (f"{name}, {way}", result[key]["tokens_per_second"], None)
            for name, result in generations(content).items()
            for way, key in (("EAGLE", "eagle"), ("plain", "plain"))
        ]
        yield Section("Models", HEAD, rows, bars=[Bars("Tokens/s", "", speeds)])
    yield Section("Where it was measured", ("", "value"), list(_origin(content)))
    if lines := failures(content):
        yield Section("What went wrong", notes=lines)
    if content["kernels"]:
        yield kernels_section(content["kernels"])
    for name, entry in content["models"].items():
        for part, make in MAKERS.items():
            result = entry["parts"].get(part)
            if result is not None and "error" not in result:
                yield make(name, result)


def _origin(content: Content) -> Iterator[tuple[str, str]]:
    for number, run in enumerate(content["runs"], start=1):
        mark = f"{number}: " if len(content["runs"]) > 1 else ""
        for key, value in run.items():
            if key == "complete" and value:
                continue
            shown = "no: cut off, or still running" if key == "complete" else _words(value)
            yield mark + key, shown


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "unknown" if value is None else str(value)


def kernels_section(result: dict[str, Any]) -> Section:
    """The kernels; a red one shows its reason and no time."""
    if "error" in result:
        return Section("Kernels")
    rows, bars = [], []
    for row in result["rows"]:
        if row["state"] == "not reached":
            continue
        timed = row["state"] == "green" and row["us"] is not None
        torch_us = row["rivals"].get("torch") if timed else None
        has_rival = isinstance(torch_us, (int, float))
        rows.append(
            (
                row["op"],
                row["label"],
                row["dtype"],
                row["state"] if row["state"] != "red" else f"RED: {row['reason']}",
                "" if row["error"] is None else f"{float(row['error']):.1e}",
                f"{row['us']:.1f}" if timed else "",
                f"{torch_us:.1f}" if has_rival else "",
                f"{torch_us / row['us']:.2f}×" if has_rival else "",
                f"{row['gb_s']:.0f}" if timed else "",
                f"{row['share']:.0%}" if timed and row["share"] else "",
            )
        )
        if timed and row["share"]:
            bars.append((f"{row['op']}, {row['label']}", 100 * row["share"], None))
    head = ("op", "case", "dtype", "state", "error", "µs", "torch µs", "speed-up", "GB/s", "of the ceiling")
    chart = [Bars("Part of the measured ceiling reached", "%", bars)] if bars else []
    return Section("Kernels", head, rows, result.get("summary", ()), chart)


def generate_section(model: str, result: dict[str, Any]) -> Section:
    """Latencies of EAGLE and plain decoding."""
    both = (result["eagle"], result["plain"])

    def row(what: str, key: str, factor: float = 1.0, digits: int = 1) -> tuple[str, ...]:
        return what, *(f"{factor * figures[key]:.{digits}f}" for figures in both)

    rows = [
        row("tokens/s", "tokens_per_second"),
        row("tokens/s after the first token", "decode_tokens_per_second"),
        row("time to first token, ms, median", "first_token_seconds", 1e3),
        row("time per token, ms, median", "token_seconds_median", 1e3, 2),
        row("time per token, ms, 99th percentile", "token_seconds_p99", 1e3, 2),
        row("time per step, ms, median", "step_seconds_median", 1e3, 2),
        row("accept length", "accept_length", 1.0, 2),
    ]
    if result["eagle"]["peak_memory_bytes"] is not None:
        rows.append(row("peak memory, GB", "peak_memory_bytes", 1e-9, 2))
    prompts = result["eagle"]["prompts"]
    positions = enumerate(result["eagle"]["acceptance_by_position"], start=1)
    notes = [
        f"{prompts} prompts, at most {result['max_new_tokens']} new tokens each, greedy, one at a time, "
        f"{result['dtype']}, tree {_tree(result['tree'])}{_weights(result)}; {result['served']}",
        f"speed-up {result['speedup']:.2f}x; outputs identical to plain decoding: {result['identical']} of {prompts}",
        *_parted(result["first_difference"]),
    ]
    values = [(str(position), 100 * share, None) for position, share in positions]
    bars = [Bars("Steps that committed at least so many tokens", "%", values)]
    return Section(f"{model}: generation", ("", "EAGLE", "plain"), rows, notes, bars)


def _parted(found: dict[str, int]) -> list[str]:
    return [f"prompt {number} parts at new token {where}" for number, where in found.items()]


def roofline_section(model: str, result: dict[str, Any]) -> Section:
    """A step against the bytes it must read."""
    rows = [
        (
            f"{row['decoding']}, {row['ops']} ({row['engine']})",
            _gb(row["bytes"]["target_weights"]),
            _gb(row["bytes"]["draft_weights"]),
            _gb(row["bytes"]["target_kv"] + row["bytes"]["draft_kv"]),
            f"{row['floor_ms']:.3f}",
            f"{row['step_ms']:.3f}" if row["steps"] else "–",
            f"{row['share']:.0%}" if row["steps"] else "–",
            f"{row['tokens_per_second']:.1f}",
            f"{row['accept_length']:.2f}",
            "–"
            if row["identical"] is None or row["decoding"] == "plain"
            else f"{row['identical']} of {row['prompts']}",
        )
        for row in result["rows"]
    ]
    head = (
        *("", "target GB", "head GB", "KV GB", "floor ms", "step ms", "of the floor"),
        *("tokens/s", "accept length", "equal to plain"),
    )
    notes = [
        f"measured read bandwidth {result['read_gb_per_second']:.1f} GB/s; floor: the bytes a step must read at that "
        f"bandwidth, {result['dtype']}, tree {_tree(result['tree'])}{_weights(result)}",
    ]
    if not any(row["ops"] == "optimised" for row in result["rows"]):
        notes.append("optimising changes nothing here, so there are figures as loaded only")
    bars = [
        Bars("ms a step; the line is the floor", "ms", [(row[0], found["step_ms"], found["floor_ms"])])
        for row, found in zip(rows, result["rows"], strict=True)
    ]
    chart = [Bars(bars[0].title, "ms", [value for bar in bars for value in bar.values])] if bars else []
    return Section(f"{model}: roofline", head, rows, notes, chart)


def sweep_section(model: str, result: dict[str, Any]) -> Section:
    """Each tree in each cell, the best ones named."""
    rows, notes, bars = [], [], []
    for cell in result["cells"]:
        where = f"prefix {cell['prefix']}, batch {cell['batch']}"
        if cell["reason"]:
            notes.append(f"{where}: not measured, {cell['reason']}")
            continue
        for row in cell["rows"]:
            measured = not row["reason"]
            best = " (best)" if row["tree"] is not None and row["tree"] == cell["best"] else ""
            rows.append(
                (
                    str(cell["prefix"]),
                    str(cell["batch"]),
                    ("plain" if row["tree"] is None else _tree(row["tree"])) + best,
                    f"{row['step_ms']:.2f}" if measured else row["reason"],
                    f"{row['accept_length']:.2f}" if measured else "",
                    f"{row['tokens_per_second']:.1f}" if measured else "",
                    f"{row['identical']} of {row['prompts']}" if measured else "",
                )
            )
        values = [
            ("plain" if row["tree"] is None else _tree(row["tree"]), row["tokens_per_second"], None)
            for row in cell["rows"]
            if not row["reason"]
        ]
        bars.append(Bars(f"Tokens/s, {where}", "", values))
    head = ("prefix", "batch", "tree", "ms a step", "accept length", "tokens/s", "equal to plain")
    notes.append(
        f"{result['new_tokens']} tokens after each prefix, no end token; tokens/s of decoding, over the whole batch"
        + _weights(result)
    )
    return Section(f"{model}: trees", head, rows, notes, bars)


def accept_section(model: str, result: dict[str, Any]) -> Section:
    """Accept length by category."""
    rows = [
        (name, f"{found['accept_length']:.3f}", f"{found['identical']} of {found['prompts']}")
        for name, found in result["categories"].items()
    ]
    rows.append(("all", f"{result['accept_length']:.3f}", f"{result['identical']} of {result['prompts']}"))
    return Section(f"{model}: acceptance", ("category", "accept length", "equal to plain"), rows)


def peers_section(model: str, result: dict[str, Any]) -> Section:
    """Other engines beside this one."""
    rows, bars = [], []
    for row in result["rows"]:
        measured = row["state"] == "measured"
        engine = row["engine"] + (f" {row['version']}" if row["version"] else "")
        rows.append(
            (
                engine,
                row["setting"],
                f"{row['tokens_per_second']:.1f}" if measured else row["state"],
                f"{row['step_ms']:.2f}" if measured and row["step_ms"] else "",
                f"{row['accept_length']:.2f}" if measured and row["accept_length"] else "",
                f"{row['identical']} of {row['prompts']}" if row["identical"] is not None else "",
                row["reason"],
            )
        )
        if measured:
            bars.append((f"{row['engine']}, {row['setting']}", row["tokens_per_second"], None))
    head = ("engine", "setting", "tokens/s", "ms a step", "accept length", "equal to its own plain output", "remark")
    notes = [
        f"the same folders and {result['prompts']} prompts, at most {result['max_new_tokens']} new tokens each, greedy, one "
        "at a time, each engine in its own process after a run that does not count; prefill is in the times"
    ]
    if "dtype" in result:
        notes[0] += f"; {result['dtype']}, this package's tree {_tree(result['tree'])}"
    return Section(f"{model}: beside other engines", head, rows, notes, [Bars("Tokens/s", "", bars)] if bars else [])


MAKERS = {
    "generate": generate_section,
    "roofline": roofline_section,
    "sweep": sweep_section,
    "accept": accept_section,
    "peers": peers_section,
}


def _tree(shape: Sequence[int]) -> str:
    return "/".join(map(str, shape))


def _weights(result: dict[str, Any]) -> str:
    """What was asked for as one-byte weights, if anything."""
    parts = ((part, result.get(f"{part}_dtype", "same")) for part in ("target", "draft"))
    return "".join(f", optimised: {part}'s weights in {dtype}" for part, dtype in parts if dtype != "same")


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}"
