"""Attention patterns of the heads of a layer, with the codes of each head beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_codebook.errors import ConfigError, ShapeError, check_whole
from tl_codebook.names import Code, hook_name
from tl_codebook.views.circuitsvis import Component, inert
from tl_codebook.views.colours import level_of
from tl_codebook.views.matrix import column_label, short
from tl_codebook.views.reading import as_row, label_of, model_pieces, recording_inputs
from tl_codebook.views.spans import fragment, legend, note
from tl_codebook.views.view import View
from tl_codebook.views.visible import Piece, escape, shown

__all__ = ["show_attention"]

_CELL, _LETTER = 14, 6.7
_FAINTEST = 0.005
"""Shares of attention below this are not drawn."""


def show_attention(
    model: Any,
    text: Any,
    layer: int,
    *,
    heads: int | Iterable[int] | None = None,
    n: int = 4,
    max_tokens: int = 48,
    labels: Any = None,
    title: str | None = None,
) -> View:
    """Show where each head of a layer looks in a text, and beside every token the codes of that head at ``z``, if it has a codebook.

    Rows are the tokens that look, columns those that are looked at; the stronger the colour, the more attention, 0 to 1 (shares below 0.005
    are left blank).

    Args:
        model: A model; its codebooks, if it has any, are at work.
        text: A text or token ids [pos].
        layer: Which layer, negative ones from the end.
        heads: Which heads; all by default.
        n: Most codes beside a token, >= 0; all are in the tooltip.
        max_tokens: Most tokens, the first ones, >= 1; how many are left out is said.
        labels: Names of codes: a mapping from label to text, such as `CodeLabels`.
        title: Instead of one that says what is shown.

    Raises:
        ConfigError: no such layer or head, or a number that cannot be.
        DataError, ShapeError: a text that cannot be shown.
        UnknownHookError, HookNeverFiredError: the model does not tell its attention patterns.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "z", n_codes=1)
    >>> print(show_attention(model, "w3 w4", 0, heads=1))
    Attention of layer 0
    head 1: token, what it looks at most, codes L0.z.1
      0  <bos>  0 <bos> 1.00  0
      1   w3    ...
    """
    from tl_codebook.hosts import as_host, n_layers

    host = as_host(model)
    check_whole("n", n, least=0)
    check_whole("max_tokens", max_tokens, least=1)
    total = n_layers(host)
    if isinstance(layer, bool) or not isinstance(layer, int) or not -total <= layer < total:
        raise ConfigError(f"layer={layer!r} was asked for, but the model has {total} layers. Give 0 to {total - 1}, or -{total} to -1.")
    layer %= total
    row = as_row(host, text, "text")
    chosen = _heads(heads, int(host.cfg.n_heads))
    pattern, slots = _run(host, row, layer)
    pieces = model_pieces(host, row)
    shown_pieces, codes = pieces[:max_tokens], _codes_of_heads(slots, layer, int(host.cfg.n_heads))
    length = len(shown_pieces)
    title = shown(title or f"Attention of layer {layer}")
    body, lines, figures = [legend("0", "1: all of the attention")], [title], []
    if length < len(pieces):
        said = f"shown: the first {length} of {len(pieces)} tokens"
        body.append(note(said))
        lines.append(said)
    for head in chosen:
        values = pattern[head, :length, :length]
        figures.append(_figure(head, values, shown_pieces, codes.get(head), n, labels))
        lines += _listed(head, values, shown_pieces, codes.get(head))
    if not codes:
        body.append(note(f"No codebook sits at {hook_name(layer, 'z')}, so there are no codes beside the tokens."))
    body.append(f'<div class="grid">{"".join(figures)}</div>')
    props = {
        "tokens": [inert(piece) for piece in shown_pieces],
        "attention": [np.round(pattern[head, :length, :length].astype(float), 4).tolist() for head in chosen],
        "attentionHeadNames": [f"L{layer}H{head}" for head in chosen],
        "maxValue": 1,
        "minValue": -1,
    }
    return View(title, "\n".join(lines), fragment(title, body), (Component("AttentionHeads", props, title),))


def _heads(heads: Any, total: int) -> list[int]:
    chosen = list(range(total)) if heads is None else [heads] if isinstance(heads, int) else list(heads)
    if not chosen:
        raise ConfigError(f"heads is empty. Give one or more of 0 to {total - 1}, or leave it out for all of them.")
    for head in chosen:
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < total:
            raise ConfigError(f"head {head!r} was asked for, but the layer has {total}. Give 0 to {total - 1}.")
    return list(dict.fromkeys(chosen))


def _run(host: Any, row: Tensor, layer: int) -> tuple[Float[np.ndarray, "head query key"], np.ndarray | None]:
    """Return the pattern of a layer, and the codes at z [token group slot] where there are."""
    from tl_codebook.attachment import sites
    from tl_codebook.steering import run_rows

    found: dict[str, Tensor] = {}

    def note_pattern(pattern: Tensor, hook: Any) -> None:
        found["pattern"] = pattern.detach().float().cpu()

    name = hook_name(layer, "z")
    points = sites(host)
    hooks, slots, _ = recording_inputs(host, [name], row.shape[1]) if name in points and points[name].enabled else ([], {}, {})
    run_rows(host, row, [(f"blocks.{layer}.attn.hook_pattern", note_pattern), *hooks])
    pattern = found["pattern"]
    if pattern.ndim != 4 or pattern.shape[0] != 1 or pattern.shape[-1] != row.shape[1]:
        raise ShapeError(f"the attention pattern of layer {layer} has the shape {list(pattern.shape)}, not [1 head query key].")
    return pattern[0].numpy(), slots.get(name)


def _codes_of_heads(slots: np.ndarray | None, layer: int, n_heads: int) -> dict[int, list[list[Code]]]:
    """Return the codes at each token by head: those of its group, or of its groups where a head has several."""
    if slots is None:
        return {}
    n_groups = slots.shape[1]
    found: dict[int, list[list[Code]]] = {}
    for head in range(n_heads):
        first = head * n_groups // n_heads
        own = range(first, max(first + 1, (head + 1) * n_groups // n_heads))
        found[head] = [
            [Code(layer, "z", g if n_groups > 1 else None, number) for g in own for number in token[g].tolist() if number >= 0]
            for token in slots
        ]
    return found


def _listed(head: int, values: np.ndarray, pieces: list[Piece], codes: list[list[Code]] | None) -> list[str]:
    """Return a line of text for each token: what it looks at most, and its codes."""
    where = sorted({str(code.address) for row in codes or [] for code in row})
    lines = [f"head {head}: token, what it looks at most" + (f", codes {' '.join(where)}" if where else "")]
    width = min(16, max(len(piece.text) for piece in pieces))
    for i, piece in enumerate(pieces):
        best = int(np.nanargmax(values[i])) if np.isfinite(values[i]).any() else 0
        ids = " ".join(str(code.code) for code in codes[i]) if codes else ""
        text = f"{i:>3}  {piece.text:<{width}}  {best} {pieces[best].text.strip()} {values[i, best]:.2f}  {ids}"
        lines.append(text.rstrip())
    return lines


def _figure(head: int, values: np.ndarray, pieces: list[Piece], codes: list[list[Code]] | None, n: int, labels: Any) -> str:
    length, parts = len(pieces), []
    texts = [short(piece.text, 14) for piece in pieces]
    size = length * _CELL
    for query in range(length):
        for key in range(query + 1):
            value = float(values[query, key])
            if value >= _FAINTEST or value != value:
                tip = "&#10;".join(escape(t) for t in (f"{query} {pieces[query].text} → {key} {pieces[key].text}", f"{value:.3f}"))
                colour = f"a{level_of(value)}" if value == value else "band"
                place = f'x="{key * _CELL}" y="{query * _CELL}" width="{_CELL}" height="{_CELL}"'
                parts.append(f'<rect class="{colour}" {place}><title>{tip}</title></rect>')
    parts.append(f'<path class="box" d="M0,0 V{size} H{size} {_stairs(length)} Z"/>')
    wide = 0.0
    for i, text in enumerate(texts):
        y = i * _CELL + 11
        parts.append(f'<text class="mono" text-anchor="end" x="-6" y="{y}">{escape(text)}</text>')
        if codes is not None:
            ids = " ".join(str(code.code) for code in codes[i][:n]) + (" …" if len(codes[i]) > n else "")
            said = [pieces[i].text, *(f"{code} {label_of(labels, code)}".strip() for code in codes[i])]
            tip = "&#10;".join(escape(each) for each in said)
            parts.append(f'<text x="{size + 10}" y="{y}">{escape(ids)}<title>{tip}</title></text>')
            wide = max(wide, _LETTER * len(ids) + 16)
    left = 12 + _LETTER * max(len(text) for text in texts)
    below = 14 + 6.2 * max(len(text) for text in texts)
    parts += [column_label(x * _CELL + 10, size + 9, text) for x, text in enumerate(texts)]
    above = 0
    if codes is not None:
        above = 16
        places = sorted({str(code.address) for row in codes for code in row})
        parts.append(f'<text class="on" x="{size + 10}" y="-5">{escape(short(" ".join(places), 24).replace(chr(0x2423), " "))}</text>')
        wide = max(wide, 80.0)
    width, height = left + size + wide + 6, above + size + below
    box = f'width="{width:.0f}" height="{height:.0f}" viewBox="{-left:.0f} {-above} {width:.0f} {height:.0f}"'
    drawing = f'<svg role="img" aria-label="attention of head {head}" {box}>{"".join(parts)}</svg>'
    return f'<figure><figcaption>head {head}</figcaption><div class="scroll">{drawing}</div></figure>'


def _stairs(length: int) -> str:
    """Return the way back along the diagonal, from the lower right to the upper left."""
    return " ".join(f"V{i * _CELL} H{i * _CELL}" for i in range(length - 1, -1, -1))
