"""Rows as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["bytes_text", "model_table", "seconds_text", "snap_table"]


def seconds_text(seconds: float | None) -> str:
    """Write a time.

    >>> seconds_text(0.01234), seconds_text(2.5), seconds_text(None)
    ('12.3 ms', '2.50 s', '-')
    """
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms" if milliseconds >= 1 else f"{milliseconds:.3f} ms"


def bytes_text(n: int | None) -> str:
    """Write a size in units of 2**20 bytes.

    >>> bytes_text(3 * 2**20), bytes_text(None)
    ('3.0 MiB', '-')
    """
    if n is None:
        return "-"
    size = n / 2**20
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.1f} MiB"


def _aligned(lines: Sequence[Sequence[str]], n_left: int) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(max(map(len, lines)))]
    rows = ["  ".join(cell.ljust(w) if i < n_left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)


def snap_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows of snaps, a block for each case; peers that did not run are listed below with the reason."""
    lines = [["shape", "rows", "what", "peer", "time", "x GEMM", "memory", "wrong rows", "gradient error"]]
    skipped: dict[str, str] = {}
    last = None
    for row in rows:
        what = f"{row['selection']} {row['similarity']} {row['dtype']} {row['op']}"
        if row["skipped"]:
            skipped.setdefault(f"{row['peer']}, {what}", row["skipped"])
            continue
        case = (row["shape"], row["rows"], what)
        head = [row["shape"], str(row["rows"]), what] if case != last else ["", "", ""]
        last = case
        wrong, error = row.get("wrong_rows"), row.get("gradient_error")
        figures = [seconds_text(row["seconds"]), f"{row['ratio_to_gemm']:.2f}", bytes_text(row["peak_bytes"])]
        lines.append([*head, row["peer"], *figures, "-" if wrong is None else f"{wrong:.2%}", "-" if error is None else f"{error:.0e}"])
    text = _aligned(lines, 4)
    return text + "".join(f"\nnot run: {peer}: {reason}" for peer, reason in skipped.items())


def model_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows of whole models."""
    lines = [["model", "tokens", "what", "codebooks", "time", "x without"]]
    for row in rows:
        head = [row["model"], f"{row['batch']}x{row['pos']}", row["op"], row["codebooks"]]
        lines.append([*head, seconds_text(row["seconds"]), f"{row['ratio_to_none']:.2f}"])
    return _aligned(lines, 4)
