"""A document as a list of blocks, written once and rendered as Markdown and as one self-contained HTML page.

The page has no scripts and no outside resources, and a content policy that would refuse them; all text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Chapter:
    """A heading above headings."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Tiles:
    """Headline figures: (label, value, note)."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """Text in the first column, figures in the others. `total`: the last row sums the others up."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    total: bool = False


@dataclass(frozen=True)
class Plot:
    """`svg` as `audit.figures` makes it; `caption` says what there is to see."""

    svg: str
    caption: str


Block = Chapter | Heading | Paragraph | Items | Tiles | Table | Plot


def worded(block: Block, say: Callable[[str], str]) -> Block:
    """The block with all its words put otherwise; plots aside, whose words are in their picture."""
    match block:
        case Heading(text) | Paragraph(text) | Chapter(text):
            return replace(block, text=say(text))
        case Items(texts):
            return Items([say(text) for text in texts])
        case Tiles(tiles):
            return Tiles([(say(label), say(value), say(note)) for label, value, note in tiles])
        case Table(header, rows, caption, total):
            return Table([say(c) for c in header], [[say(c) for c in row] for row in rows], say(caption), total)
        case Plot():
            return block


def to_markdown(title: str, subtitle: str, blocks: Sequence[Block], plots_in: str) -> str:
    """`plots_in`: name of the HTML page beside it, since Markdown holds no plots."""
    parts = [f"# {_plain(title)}", _plain(subtitle), *(_markdown(block, plots_in) for block in blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block, plots_in: str) -> str:
    match block:
        case Chapter(text):
            return f"# {_plain(text)}"
        case Heading(text):
            return f"## {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Items(texts):
            return "\n".join(f"- {_plain(text)}" for text in texts)
        case Tiles(tiles):
            return "\n".join(
                f"- {_plain(label)}: **{_plain(value)}**" + (f" ({_plain(note)})" if note else "")
                for label, value, note in tiles
            )
        case Table(header, rows, caption):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            cells = ["| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
            return f"{_plain(caption)}\n\n" + "\n".join(cells)
        case Plot(_, caption):
            return f"*{_plain(caption)}* (plot in [{plots_in}]({plots_in}))"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def to_html(title: str, subtitle: str, blocks: Sequence[Block], language: str = "en") -> str:
    level = 3 if any(isinstance(block, Chapter) for block in blocks) else 2
    body = "\n".join(_html(block, level) for block in blocks)
    return f"""<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<main>
{body}
</main>
</body>
</html>
"""


def _html(block: Block, level: int) -> str:
    """`level`: of headings below the title and, if there are some, below chapters."""
    match block:
        case Chapter(text):
            return f'<h2 class="chapter">{escape(text)}</h2>'
        case Heading(text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
        case Tiles(tiles):
            inner = (
                f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
                for label, value, note in tiles
            )
            return f'<dl class="tiles">{"".join(inner)}</dl>'
        case Table(header, rows, caption, total):
            head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
            lines = "".join(_row(row) for row in rows)
            kind = ' class="total"' if total else ""
            return (
                f'<figure><figcaption>{escape(caption)}</figcaption><div class="wide"><table{kind}>'
                f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></figure>"
            )
        case Plot(svg, caption):
            return f'<figure><div class="wide">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _row(cells: Sequence[str]) -> str:
    figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escape(cells[0])}</th>{figures}</tr>'


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --soft: #5b646e; --grid: #dfe3e8; --card: #f5f7f9;
  --s1: #0072b2; --s2: #c44e00; --s3: #00805c; --s4: #b0568a; --s5: #8a6500; --s6: #5b646e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e8ebee; --soft: #a3adb8; --grid: #343b43;
  --card: #1d2329; --s1: #56b4e9; --s2: #ff9557; --s3: #35c9a3; --s4: #e79ac6; --s5: #e8bf3f; --s6: #a3adb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; }
h2.chapter { font-size: 1.5rem; margin-top: 3.5rem; padding-top: 1rem; border-top: 2px solid var(--grid); }
header p { color: var(--soft); margin: .2rem 0 1.5rem; } p { max-width: 44rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.tiles dt { color: var(--soft); font-size: .85rem; } .tiles dd { margin: 0; color: var(--soft); font-size: .85rem; }
.tiles dt + dd { color: var(--ink); font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .92rem; }
td { font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 400; } thead th { vertical-align: bottom; white-space: normal; }
table.total tbody tr:last-child > * { font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figure svg * { stroke-linejoin: round; } figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 44rem; }
li { overflow-wrap: anywhere; }
"""
