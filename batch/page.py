"""A page of HTML that stands alone: no scripts, nothing fetched, and no text that is taken for markup.

What data says (column names, reasons, file names) comes from strangers: it goes through `text`, and the page's content security
policy forbids everything but its own style and the pictures inside it.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from typing import Final

from triform.cli.output import printable

LONGEST: Final = 300  # characters of a cell
STYLE: Final = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #d5d5d5; --soft: #5c5c5c; --note: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #16181b; --line: #3b3f45; --soft: #a8adb4; --note: #3a3217; }
}
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 48rem; }
.soft { color: var(--soft); }
.note { background: var(--note); padding: .4rem .7rem; border-radius: 4px; }
figure { margin: .75rem 0; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
caption { white-space: nowrap; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .2rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
td { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); }
@media print { :root { --text: #000; --page: #fff; } figure, tr { break-inside: avoid; } }
"""


def text(value: object) -> str:
    """The value as text in HTML: markup and control characters escaped, long ones cut."""
    shown = printable(value)
    return html.escape(shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…")


def paragraph(words: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{text(words)}</p>"


def heading(level: int, words: str) -> str:
    return f"<h{level}>{text(words)}</h{level}>"


def picture(svg: bytes, says: str) -> str:
    """A picture with what it says in words, for those who do not see it."""
    return f'<figure><img alt="{text(says)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"></figure>'


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers stand to the right; the first cell of a row names it."""
    body = list(rows)
    kinds = ["number" if _numeric([row[i] for row in body]) else "" for i in range(len(headers))]
    head = "".join(f'<th scope="col"{_class(kind)}>{text(header)}</th>' for header, kind in zip(headers, kinds, strict=True))
    lines = "\n".join(f"<tr>{_cells(row, kinds)}</tr>" for row in body)
    return _table(caption, f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>")


def facts(caption: str, rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    lines = "\n".join(f'<tr><th scope="row">{text(name)}</th><td>{_number(value)}</td></tr>' for name, value in rows)
    return _table(caption, f"<tbody>{lines}</tbody>")


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def page(title: str, sections: Iterable[str]) -> bytes:
    body = "\n".join(sections)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
""".encode()


def _table(caption: str, content: str) -> str:
    return f'<div class="scroll"><table><caption>{text(caption)}</caption>{content}</table></div>'


def _numeric(column: Sequence[object]) -> bool:
    return bool(column) and all(isinstance(value, int | float) or value == "" for value in column)


def _cells(row: Sequence[object], kinds: Sequence[str]) -> str:
    first, *others = (f"{_class(kind)}>{_number(value)}" for value, kind in zip(row, kinds, strict=True))
    return f'<th scope="row"{first}</th>' + "".join(f"<td{other}</td>" for other in others)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
