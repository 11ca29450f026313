"""Tables on the terminal that can be written as Markdown too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


class Report:
    """Prints each table as it is made, and keeps it."""

    def __init__(self) -> None:
        self._console = Console(width=150)
        self._sections: list[str] = []

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        shown = Table(columns[0], title=title, title_justify="left")
        for column in columns[1:]:
            shown.add_column(column, justify="right")
        for row in rows:
            shown.add_row(*row)
        self._console.print(shown)
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        self._sections.append("\n".join([f"### {title}", "", *("| " + " | ".join(line) + " |" for line in lines)]))

    def write(self, path: Path) -> None:
        path.write_text("\n\n".join(self._sections) + "\n")
