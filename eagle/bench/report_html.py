"""A report as one HTML file that needs nothing else: styles and charts are inside."""

from __future__ import annotations

from html import escape

from eagle.bench.report import Content
from eagle.bench.report_tables import CPU_MARK, Bars, Section, sections

STYLE = """
:root { color-scheme: light dark; --bar: #2a6fbb; --mark: #d2691e; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
.wide { overflow-x: auto; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.warning { border-left: 4px solid var(--mark); padding: .4rem .8rem; font-weight: 600; }
svg { display: block; margin: .8rem 0; max-width: 100%; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; }
"""
ROW, LABEL, WIDTH, VALUE = 20, 300, 420, 90
"""Pixels: a bar's height, and the widths of label, plot and printed value."""


def html(content: Content) -> str:
    """The whole report."""
    body = ["<h1>Benchmark report</h1>"]
    if not content["gpu"]:
        body.append(f'<p class="warning">{escape(CPU_MARK)}</p>')
    body += [_section(section) for section in sections(content)]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Benchmark report</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>'
    )
    return head + "\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.rows:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in section.head)
        rows = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in section.rows)
        parts.append(f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(rows) + "</table></div>")
    if section.notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in section.notes) + "</ul>")
    parts += [bars_svg(bars) for bars in section.bars]
    return "\n".join(parts)


def bars_svg(bars: Bars) -> str:
    """Horizontal bars with their values printed; a mark is a line across its bar."""
    # By hand and not by matplotlib: the report is then complete where that is not installed, and its texts stay texts.
    longest = max((max(value, mark or 0.0) for _, value, mark in bars.values), default=0.0) or 1.0
    height, width = ROW * (len(bars.values) + 1), LABEL + WIDTH + VALUE
    shapes = [f'<text x="0" y="14" font-weight="600">{escape(bars.title)}</text>']
    for index, (label, value, mark) in enumerate(bars.values, start=1):
        top, length = ROW * index, WIDTH * value / longest
        shown = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
        if len(label) > 46:
            label = label[:45] + "…"
        shapes += [
            f'<text x="{LABEL - 8}" y="{top + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{top + 3}" width="{length:.1f}" height="{ROW - 6}" fill="var(--bar)"/>',
            f'<text x="{LABEL + length + 6:.1f}" y="{top + 14}">{shown} {escape(bars.unit)}</text>',
        ]
        if mark is not None:
            x = LABEL + WIDTH * mark / longest
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top + 1}" y2="{top + ROW - 1}"'
            shapes.append(f'<line {ends} stroke="var(--mark)" stroke-width="2"/>')
    frame = f'viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(bars.title, quote=True)}"'
    return f"<svg {frame}>" + "".join(shapes) + "</svg>"
