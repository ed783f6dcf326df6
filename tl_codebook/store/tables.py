"""Tables of result rows as CSV files that a spreadsheet opens without running anything in them."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tl_codebook import files
from tl_codebook.characters import without_hostile
from tl_codebook.errors import DataError

__all__ = ["write_csv"]

_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What a spreadsheet takes for the beginning of a formula, the last four in full width."""


def write_csv(rows: Iterable[Any], path: str | Path, *, of: type | None = None, overwrite: bool = False) -> None:
    r"""Write result rows (`CodeHit`, `CodeLabel` ...) as a table: UTF-8, a line a row, the fields as the head; in one step.

    Numbers are written in full and stay numbers; None is an empty cell; lists and tuples are joined by spaces. Text that a spreadsheet
    would take for a formula (it begins with ``= + - @``, a tab or the end of a line) gets a single quote before it; what acts or hides
    (control characters, marks of direction, what has no width) is written out (``\x1b``), but for tabs and ends of a line.

    Args:
        rows: Dataclasses, all of one type.
        path: The file.
        of: Their type, needed where there may be no rows, for the head.
        overwrite: Replace a file that is there.

    Raises:
        DataError: rows that are no dataclasses or of several types, or none and no type.
        CheckpointExistsError: the file exists, and `overwrite` was not said.
        CheckpointError: it cannot be written there.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Row:
    ...     text: str
    ...     gain: float
    >>> write_csv([Row("=cmd", -0.5), Row("a, b", 2.0)], tmp_path / "rows.csv")
    >>> print((tmp_path / "rows.csv").read_text())
    text,gain
    '=cmd,-0.5
    "a, b",2.0
    <BLANKLINE>
    """
    found = list(rows)
    kind = of if of is not None else type(found[0]) if found else None
    if kind is None:
        raise DataError("no rows were given, so that the head of the table is not known. Give of=CodeHit, or whatever they are.")
    other = next((row for row in found if type(row) is not kind), None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)) or other is not None:
        what = f"{type(other).__name__} beside {kind.__name__}" if other is not None else f"{kind!r}"
        raise DataError(f"rows of {what} were given. Give dataclasses of one type, as search_codes returns.")
    target = files.target_file(path, overwrite)
    fields = [field.name for field in dataclasses.fields(kind)]
    lines = [fields, *([_cell(getattr(row, name)) for name in fields] for row in found)]
    files.replace_text(target, "".join((",".join(map(_quoted, line)) or '""') + "\n" for line in lines))  # no line is empty


def _quoted(cell: str) -> str:
    # The csv module leaves a lone carriage return unquoted, at which readers begin a new row.
    return '"' + cell.replace('"', '""') + '"' if re.search('[",\r\n]', cell) else cell


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        return ""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, list | tuple):
        value = " ".join(_cell(item) for item in value)
    text = str(value)
    text = "'" + text if text.startswith(_FORMULA) else text
    return without_hostile(text, keep="\t\r\n")
