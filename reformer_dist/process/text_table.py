"""Tables as plain text: aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Cell = str | float | None


def format_table(rows: Sequence[Mapping[str, Cell]], columns: Sequence[str] | None = None) -> str:
    """Lines of a header and of each row. columns: names in order; None: those of the first row."""
    names = list(rows[0]) if columns is None else list(columns)
    lines = [names, *([format_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(names))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def format_cell(value: Cell) -> str:
    """Four significant digits, or whole numbers with separators; - for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
