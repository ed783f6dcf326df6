"""Codes by tokens: which code is in which slot, as a drawing without scripts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tl_codebook.errors import check_whole
from tl_codebook.views.reading import Group, Passage, books_of, groups_of, label_of, read
from tl_codebook.views.spans import fragment, legend, note
from tl_codebook.views.texts import rank_level
from tl_codebook.views.view import View
from tl_codebook.views.visible import escape, shown

__all__ = ["column_label", "short", "show_code_heatmap"]

_CELL, _LETTER = 17, 6.6
_MOST_GROUPS = 32


def show_code_heatmap(
    model_or_store: Any,
    text_or_sequence: Any,
    site: Any,
    *,
    max_codes: int = 30,
    max_tokens: int = 96,
    labels: Any = None,
    title: str | None = None,
) -> View:
    """Show which codes fire where in a text: a row for each code, a column for each token, coloured by slot, the first strongest.

    Args:
        model_or_store: A model with codebooks, which runs over the text, or a `CodeStore`.
        text_or_sequence: For a model a text or token ids [pos]; for a store the number of a sequence, a `Context`, or a list of these.
        site: A site, address or hook name; where it has several groups (heads), each has its own rows. ``L5.z.2`` is one of them.
        max_codes: Most rows of a group, those of the codes that fire most in the text, >= 1; how many are left out is said.
        max_tokens: Most columns, the first ones, >= 1; how many are left out is said.
        labels: Names of codes: a mapping from label to text, such as `CodeLabels`.
        title: Instead of one that says what is shown.

    Raises:
        ConfigError: a number below one.
        DataError, PositionError, ShapeError: a text or sequence that cannot be shown.
        UnknownHookError: no such site.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=1)
    >>> print(show_code_heatmap(model, "w3 w4", "L0.mlp_out"))
    Codes of L0.mlp_out by token
    L0.mlp_out · text · 3 tokens
    0 ×3: slot 0 at 0 1 2
    """
    check_whole("max_codes", max_codes, least=1)
    check_whole("max_tokens", max_tokens, least=1)
    groups = groups_of(model_or_store, site)
    passages = read(model_or_store, text_or_sequence, dict.fromkeys(group.hook_name for group in groups))
    books = books_of(model_or_store)
    title = shown(title or f"Codes of {site} by token")
    body, lines = [legend("does not fire", "first slot", [3, 6, 10])], [title]
    blocks = [(passage, group) for passage in passages for group in groups]
    for passage, group in blocks[:_MOST_GROUPS]:
        _add(body, lines, passage, group, books[group.hook_name].k, max_codes, max_tokens, labels)
    if len(blocks) > _MOST_GROUPS:
        said = f"{len(blocks) - _MOST_GROUPS} more texts or groups are not shown. Give one group, such as {groups[0]}."
        body.append(note(said))
        lines.append(said)
    return View(title, "\n".join(lines), fragment(title, body))


def short(text: str, most: int) -> str:
    """Cut a label that is too long, and show its spaces.

    >>> short(" Yorkshire", 6)
    '␣York…'
    """
    text = text.replace(" ", "\u2423")
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def column_label(x: int | float, y: int | float, text: str) -> str:
    """Return text of a drawing that hangs down from a place, aslant."""
    return f'<text class="mono" text-anchor="end" transform="translate({x:g},{y:g}) rotate(-60)">{escape(text)}</text>'


def _add(body: list[str], lines: list[str], passage: Passage, group: Group, k: int, max_codes: int, max_tokens: int, labels: Any) -> None:
    slots = passage.slots[group.hook_name][:max_tokens, group.group]
    n_tokens = len(passage.pieces)
    used = Counter(number for row in slots.tolist() for number in dict.fromkeys(row) if number >= 0)
    first = {number: i for i, number in enumerate(used)}  # in the order in which they come up
    rows = sorted(used, key=lambda number: (-used[number], first[number]))[:max_codes]
    cut = []
    if n_tokens > len(slots):
        cut.append(f"the first {len(slots)} of {n_tokens} tokens")
    if len(used) > len(rows):
        cut.append(f"the {len(rows)} most frequent of {len(used)} codes")
    said = f"{passage.where} · {n_tokens} tokens" + (f" · shown: {', '.join(cut)}" if cut else "")
    body.append(f'<div class="head">{escape(group)}<span class="say"> · {escape(said)}</span></div>')
    lines.append(f"{group} · {said}")
    names = {number: label_of(labels, group.code(number)) for number in rows}
    cells = []
    for y, number in enumerate(rows):
        rank = passage.rank(group, number)[: len(slots)].tolist()
        by_slot = {slot: [passage.first + i for i, each in enumerate(rank) if each == slot] for slot in sorted({r for r in rank if r >= 0})}
        name = f" \u201c{names[number]}\u201d" if names[number] else ""
        lines.append(f"{number}{name} ×{used[number]}: " + "; ".join(f"slot {s} at {' '.join(map(str, at))}" for s, at in by_slot.items()))
        for x, slot in enumerate(rank):
            if slot >= 0:
                tip = "&#10;".join(
                    escape(line) for line in (passage.pieces[x].text, passage.said(x), f"{group.code(number)}{name}, slot {slot}")
                )
                place = f'x="{x * _CELL + 1}" y="{y * _CELL + 1}" width="{_CELL - 2}" height="{_CELL - 2}"'
                cells.append(f'<rect class="a{rank_level(slot, k)}" rx="2" {place}><title>{tip}</title></rect>')
    body.append(_drawing(passage, rows, names, cells, len(slots)))


def _drawing(passage: Passage, rows: list[int], names: dict[int, str], cells: list[str], n_columns: int) -> str:
    texts = [short(f"{number} {names[number]}".strip(), 28) for number in rows]
    left = 10 + _LETTER * max((len(text) for text in texts), default=1)
    tokens = [short(piece.text, 14) for piece in passage.pieces[:n_columns]]
    below = 16 + 6.2 * max(len(text) for text in tokens)
    width, height = n_columns * _CELL, len(rows) * _CELL
    bands = [f'<rect class="band" x="0" y="{y * _CELL}" width="{width}" height="{_CELL}"/>' for y in range(0, len(rows), 2)]
    labels = [
        f'<text text-anchor="end" x="-6" y="{y * _CELL + 12}">{escape(text.replace(chr(0x2423), " "))}</text>'
        for y, text in enumerate(texts)
    ]
    columns = [column_label(x * _CELL + 12, height + 9, text) for x, text in enumerate(tokens)]
    size = (
        f'width="{left + width + 8:.0f}" height="{height + below:.0f}" viewBox="{-left:.0f} 0 {left + width + 8:.0f} {height + below:.0f}"'
    )
    inside = "".join([*bands, f'<rect class="box" x="0" y="0" width="{width}" height="{height}"/>', *cells, *labels, *columns])
    return f'<div class="scroll"><svg role="img" aria-label="codes by token" {size}>{inside}</svg></div>'
