"""Tokens coloured by the codes at them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from tl_codebook.errors import ConfigError, check_whole
from tl_codebook.names import Code
from tl_codebook.views.circuitsvis import Component, inert
from tl_codebook.views.colours import N_LEVELS, hue_of, level_of
from tl_codebook.views.reading import Group, Passage, as_codes_given, books_of, group_of, groups_of, is_store, label_of, read
from tl_codebook.views.spans import fragment, legend, line_of, note, text_block, token_span
from tl_codebook.views.view import View
from tl_codebook.views.visible import escape, shown

__all__ = ["Colour", "heading", "rank_level", "rank_values", "show_codes"]

Colour = Literal["similarity", "rank", "fires"]

_MOST_BLOCKS = 32
_MOST_NUMBERS = 100_000
"""Values that an interactive part holds: CircuitsVis writes every token times every code."""


def show_codes(
    model_or_store: Any,
    text_or_sequence: Any,
    code_or_site: Any,
    *,
    colour: Colour | None = None,
    n: int = 1,
    highest: int | float | None = None,
    labels: Any = None,
    title: str | None = None,
) -> View:
    """Show the tokens of a text, coloured by how a code fires at them, or each with its codes.

    Args:
        model_or_store: A model with codebooks, which runs over the text, or a `CodeStore`.
        text_or_sequence: For a model a text or token ids [pos]; for a store the number of a sequence, a `Context`, or a list of these.
        code_or_site: A code (`Code`, label, `CodeHit`) or several, each shown on its own; or a site, address or hook name, whose codes are
            written under each token, coloured by the first one.
        colour: What colours the tokens, for codes: ``similarity`` (cosine of the activation there, after the codebook's input norm, and
            the code, -1 to 1, which needs a model, and is the default with one; of the whole activation even where codes are chosen as a
            pursuit, ``selection="residual"``), ``rank`` (the slot that the code fires in, the first slot strongest; the default with a
            store) or ``fires`` (whether it fires). Where the code fires, the token is underlined.
        n: Most codes written under a token, for a site, >= 0; all are in its tooltip.
        highest: The similarity that has the full colour, above 0; by default the largest in the text.
        labels: Names of codes: a mapping from label to text, such as `CodeLabels`.
        title: Instead of one that says what is shown.

    Raises:
        ConfigError: an option that cannot be, such as similarity without a model.
        DataError, PositionError, ShapeError: a text or sequence that cannot be shown.
        UnknownHookError, LabelError, InvalidCodeError: no such code or site.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> print(show_codes(model, torch.tensor([3, 4]), "L0.mlp_out"))
    Codes of L0.mlp_out
    L0.mlp_out · text
      0  w3  ...
      1  w4  ...
    >>> show_codes(model, "w3 w4", "L0.mlp_out:3")
    View('L0.mlp_out:3', ColoredTokens)
    """
    check_whole("n", n, least=0)
    if colour is not None and colour not in get_args(Colour):
        raise ConfigError(f"colour={colour!r} was asked for. Give one of {', '.join(map(repr, get_args(Colour)))}.")
    if highest is not None and (isinstance(highest, bool) or not 0 < highest < math.inf):
        raise ConfigError(f"highest={highest!r} was asked for. Give the similarity that has the full colour, above 0.")
    codes = as_codes_given(code_or_site)
    if codes is None:
        if colour is not None or highest is not None:
            raise ConfigError("colour= and highest= are for codes, but a site was given, whose tokens have the colour of their first code.")
        groups = groups_of(model_or_store, code_or_site)
        names = dict.fromkeys(group.hook_name for group in groups)
        passages = read(model_or_store, text_or_sequence, names)
        return _of_site(books_of(model_or_store), passages, groups, str(code_or_site), n, labels, title)
    if is_store(model_or_store):
        if colour == "similarity" or highest is not None:
            raise ConfigError(
                "the similarity was asked for, but a store holds codes alone, no activations. Give the model and the text, or say "
                "colour='rank'."
            )
        colour = colour or "rank"
    places = [group_of(model_or_store, code) for code in codes]
    passages = read(model_or_store, text_or_sequence, dict.fromkeys(place.hook_name for place in places))
    books = books_of(model_or_store)
    return _of_codes(books, passages, codes, places, colour or "similarity", highest, labels, title)


def heading(code: Code, labels: Any, rest: str = "") -> tuple[str, str]:
    """Return the line above what is shown of a code, as HTML and as text."""
    name = label_of(labels, code)
    said = f" \u201c{name}\u201d" if name else ""
    text = f"{shown(code)}{said}{f' · {rest}' if rest else ''}"
    more = f'<span class="say">{escape(said)}{f" · {escape(rest)}" if rest else ""}</span>'
    return f'<div class="head">{escape(code)}{more}</div>', text


def rank_level(rank: int, k: int) -> int:
    """Return the step of the scale for the slot that a code fires in: full for the first, fainter for later ones, 0 where it does not.

    >>> [rank_level(rank, 8) for rank in (-1, 0, 4, 7)], rank_level(0, 1)
    ([0, 10, 6, 3], 10)
    """
    return 0 if rank < 0 else level_of(1 - 0.7 * rank / max(k - 1, 1))


def rank_values(rank: Int[np.ndarray, " token"], k: int) -> list[float]:
    """Return 1 where a code is in the first slot, less for later ones, above 0 for the last, 0 where it does not fire."""
    return [0.0 if each < 0 else 1 - each / k for each in rank.tolist()]


def _of_codes(
    books: Any,
    passages: list[Passage],
    codes: list[Code],
    places: list[Group],
    colour: Colour,
    highest: int | float | None,
    labels: Any,
    title: str | None,
) -> View:
    title = shown(title or ", ".join(map(str, codes[:4])) + (" …" if len(codes) > 4 else ""))
    body, lines, components = [], [title], []
    for passage in passages:
        columns = []
        for code, place in zip(codes, places, strict=True):
            book, rank = books[place.hook_name], passage.rank(place, code.code)
            if colour == "similarity":
                values = passage.similarity(place, book.codes[place.group, code.code])
                shares, key = _scaled(values, highest)
            else:
                values = np.array(rank_values(rank, book.k) if colour == "rank" else (rank >= 0).astype(float).tolist())
                shares = np.array([rank_level(r, book.k) / N_LEVELS for r in rank.tolist()] if colour == "rank" else values)
                key = legend("does not fire", "first slot" if colour == "rank" else "fires", [3, 6, 10] if colour == "rank" else [10])
            fires = np.flatnonzero(rank >= 0).tolist()
            head, line = heading(code, labels, f"{passage.where}: fires at {len(fires)} of {len(rank)} tokens")
            body += [head, key, _coloured(passage, place, rank, shares, values if colour == "similarity" else None, labels)]
            lines += [line, line_of(passage.pieces, fires)]
            columns.append([value if math.isfinite(value) else 0.0 for value in values.tolist()])
        tokens = [inert(piece) + ("" if np.isfinite(values[i]) else "\u27e8NaN\u27e9") for i, piece in enumerate(passage.pieces)]
        top = max(highest or max(max(column) for column in columns), 1e-9)
        if len(codes) == 1:
            props = {"tokens": tokens, "values": columns[0], "maxValue": top, "minValue": -top, "positiveColor": "#f28c38"}
            components.append(Component("ColoredTokens", props, f"{codes[0]}: {colour}, {passage.where}"))
        else:
            props = {"tokens": tokens, "values": [list(row) for row in zip(*columns, strict=True)], "labels": [inert(c) for c in codes]}
            components.append(Component("ColoredTokensMulti", props, f"{colour}, {passage.where}"))
    return View(title, "\n".join(lines), fragment(title, body), tuple(components))


def _scaled(values: Float[np.ndarray, " token"], highest: int | float | None) -> tuple[np.ndarray, str]:
    """Return shares of the full colour, NaN where there is none, and the key."""
    finite = values[np.isfinite(values)]
    top = highest or max(float(finite.max(initial=0.0)), 0.0)
    shares = values / top if top > 0 else np.where(np.isfinite(values), 0.0, values)
    if top == 0:
        return shares, note("no cosine similarity is above 0; underlined: fires")
    return shares, legend("cosine similarity 0 or less", f"{top:.2f}; underlined: fires")


def _codes_said(passage: Passage, group: Group, index: int, labels: Any) -> str:
    there = [number for number in passage.slots[group.hook_name][index, group.group].tolist() if number >= 0]
    named = []
    for number in there:
        name = label_of(labels, group.code(number))
        named.append(f"{number} \u201c{name}\u201d" if name else str(number))
    return f"codes of {group}: {' '.join(named) or 'none'}"


def _coloured(
    passage: Passage,
    group: Group,
    rank: Int[np.ndarray, " token"],
    shares: Float[np.ndarray, " token"],
    similarity: Float[np.ndarray, " token"] | None,
    labels: Any,
) -> str:
    spans = []
    for i, piece in enumerate(passage.pieces):
        said = [passage.said(i)]
        if similarity is not None:
            said.append(
                f"similarity {similarity[i]:.3f}" if math.isfinite(similarity[i]) else "similarity NaN: the activation is not finite"
            )
        said += [f"fires in slot {rank[i]}" if rank[i] >= 0 else "does not fire", _codes_said(passage, group, i, labels)]
        level = level_of(float(shares[i]))
        colour = "nan" if math.isnan(shares[i]) else f"a{level}" if level else ""
        spans.append(token_span(piece, colour, said, fires=bool(rank[i] >= 0), marked=i == passage.marked))
    return text_block(spans)


def _of_site(books: Any, passages: list[Passage], groups: list[Group], asked: str, n: int, labels: Any, title: str | None) -> View:
    title = shown(title or f"Codes of {asked}")
    body, lines, components = [], [title], []
    left_out = len(groups) * len(passages) - _MOST_BLOCKS
    blocks = [(passage, group) for passage in passages for group in groups][:_MOST_BLOCKS]
    for passage, group in blocks:
        slots = passage.slots[group.hook_name][:, group.group]
        used = Counter(number for row in slots.tolist() for number in set(row) if number >= 0)
        body.append(f'<div class="head">{escape(group)}<span class="say"> · {escape(passage.where)}</span></div>')
        body.append(_key(group, used, labels))
        body.append(f'<div class="text codes">{"".join(_with_codes(passage, group, i, n, labels) for i in range(len(slots)))}</div>')
        lines.append(f"{group} · {passage.where}")
        width = min(24, max(len(piece.text) for piece in passage.pieces))
        for i, (piece, row) in enumerate(zip(passage.pieces, slots.tolist(), strict=True)):
            lines.append(
                f"{passage.first + i:>3}  {piece.text:<{width}}  {' '.join(str(number) for number in row if number >= 0)}".rstrip()
            )
    if left_out > 0:
        body.append(note(f"{left_out} more texts or groups are not shown. Give one group, such as {groups[0]}."))
        lines.append(f"… {left_out} more texts or groups are not shown")
    for passage in dict.fromkeys(passage for passage, _ in blocks):
        for name in dict.fromkeys(group.hook_name for _, group in blocks):
            components.append(_neurons(passage, [group for group in groups if group.hook_name == name], books[name].k))
    return View(title, "\n".join(lines), fragment(title, body), tuple(components))


def _key(group: Group, used: Counter[int], labels: Any) -> str:
    """Return the codes that fire most in a text, with their colours and how often."""
    chips = []
    for number, count in sorted(used.items(), key=lambda item: (-item[1], item[0]))[:12]:
        name = label_of(labels, group.code(number))
        said = f"{number} \u201c{name[:40]}\u201d" if name else str(number)
        chips.append(f'<span class="key h{hue_of(group.code(number))}">{escape(said)}</span> ×{count}')
    more = f" and {len(used) - 12} more codes" if len(used) > 12 else ""
    return f'<div class="note">colour: the first code. Most frequent here: {" &nbsp;".join(chips) or "none"}{more}</div>'


def _with_codes(passage: Passage, group: Group, index: int, n: int, labels: Any) -> str:
    piece = passage.pieces[index]
    there = [number for number in passage.slots[group.hook_name][index, group.group].tolist() if number >= 0]
    said = [passage.said(index), _codes_said(passage, group, index, labels)]
    colour = f"h{hue_of(group.code(there[0]))}" if there else ""
    ends = any(part.kind == "line" for part in piece.parts)
    inner = token_span(piece, colour, said, marked=index == passage.marked, breaks=False)
    ids = f"<rt>{' '.join(map(str, there[:n]))}</rt>" if n else ""
    return f"<ruby>{inner}{ids}</ruby>" + ("<br>" if ends else "<wbr>")


def _neurons(passage: Passage, groups: Sequence[Group], k: int) -> Component:
    """Return the component with a choice of group and code: 1 where the code is in the first slot, less for later ones."""
    slots = passage.slots[groups[0].hook_name]
    used = Counter(number for group in groups for row in slots[:, group.group].tolist() for number in set(row) if number >= 0)
    room = max(1, _MOST_NUMBERS // (len(slots) * len(groups)))
    numbers = [number for number, _ in sorted(used.items(), key=lambda item: (-item[1], item[0]))[:room]] or [0]
    values = np.stack([np.array([rank_values(passage.rank(group, number), k) for number in numbers]).T for group in groups], axis=1)
    left_out = f"; the {len(numbers)} most frequent of {len(used)} codes" if len(numbers) < len(used) else ""
    props = {
        "tokens": [inert(piece) for piece in passage.pieces],
        "activations": values.tolist(),
        "firstDimensionName": "Codebook",
        "secondDimensionName": "Code",
        "firstDimensionLabels": [inert(group) for group in groups],
        "secondDimensionLabels": [str(number) for number in numbers],
    }
    return Component("TextNeuronActivations", props, f"Where a code fires, {passage.where}{left_out}")
