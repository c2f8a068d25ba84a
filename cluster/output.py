"""Print a command's result: a table for a person, one line of JSON for a program.

In:  a mapping of plain values.  Out: text on stdout.
Knows nothing of which command made it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TypeGuard

Result = Mapping[str, object]


def print_result(result: Result, *, as_json: bool) -> None:
    """Print the result; as JSON it is the last line, in one piece."""
    print(json.dumps(result) if as_json else render_result(result), flush=True)


def render_result(result: Result) -> str:
    """Return lines of `name  value`; a list of mappings becomes a table below them, columns in order of appearance."""
    tables = {name: value for name, value in result.items() if _is_table(value)}
    lines = _align([(name, _render_value(value)) for name, value in result.items() if name not in tables])
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [tuple(_render_value(row.get(column)) for column in columns) for row in rows]
        lines += [*([""] if lines else []), f"{name}:", *_align([tuple(columns), *cells])]
    return "\n".join(lines)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_table(value: object) -> TypeGuard[Sequence[Result]]:
    return _is_list(value) and len(value) > 0 and all(isinstance(row, Mapping) for row in value)


def _render_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1_000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_render_value(entry)}" for key, entry in value.items()) or "-"
    if _is_list(value):
        return ", ".join(_render_value(entry) for entry in value) or "-"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
