"""A report as Markdown."""

from __future__ import annotations

from eagle.bench.report import Content
from eagle.bench.report_tables import CPU_MARK, Section, sections


def markdown(content: Content) -> str:
    """The whole report."""
    parts = ["# Benchmark report"]
    if not content["gpu"]:
        parts.append(f"**{CPU_MARK}**")
    parts += [section_markdown(section) for section in sections(content)]
    return "\n\n".join(parts) + "\n"


def section_markdown(section: Section) -> str:
    """One heading, its table and notes."""
    parts = [f"## {section.title}"]
    if section.rows:
        parts.append(table(section.head, section.rows))
    if section.notes:
        parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts)


def table(head: tuple[str, ...] | list[str], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
