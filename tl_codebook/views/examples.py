"""Places at which codes fire, each in its context."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from tl_codebook.errors import LabelError
from tl_codebook.names import Code
from tl_codebook.views.circuitsvis import Component, inert
from tl_codebook.views.colours import level_of
from tl_codebook.views.reading import Group, Passage, as_codes_given, group_of, read
from tl_codebook.views.spans import fragment, legend, line_of, note, text_block, token_span
from tl_codebook.views.texts import heading, rank_level, rank_values
from tl_codebook.views.view import View
from tl_codebook.views.visible import shown

__all__ = ["show_examples"]


def show_examples(
    store: Any,
    code: Any,
    *,
    n: int = 10,
    order: Literal["first", "random"] = "first",
    before: int = 20,
    after: int = 10,
    seed: int = 0,
    model: Any = None,
    labels: Any = None,
    title: str | None = None,
) -> View:
    """Show places at which a code fires, a line each, with the token that it fires at in a frame.

    Other tokens of a line at which the code fires are coloured too, by slot; with a model all tokens are, by similarity.

    Args:
        store: A `CodeStore`.
        code: A `Code`, a label or a `CodeHit`, or several.
        n: Most places of each code, >= 0.
        order: The first places, or some at random.
        before, after: Most tokens before and after the place, >= 0.
        seed: Of the random choice.
        model: The model that was collected from: runs over each sequence up to the end of the context, and colours by the cosine of
            activation and code (`show_codes`).
        labels: Names of codes: a mapping from label to text, such as `CodeLabels`.
        title: Instead of one that says what is shown.

    Raises:
        ConfigError: a number below zero, or another order.
        UnknownHookError, LabelError, InvalidCodeError: no such code in the store.
        BasisMismatchError: the codes of the model are not those of the store.

    >>> from tl_codebook import attach, collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=1)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> print(show_examples(store, "L0.mlp_out:0", n=2, before=1, after=1))
    Examples of L0.mlp_out:0
    L0.mlp_out:0 · fires at 7 of 7 tokens (100 %)
    sequence 0, token 0: ⟦<bos>⟧ w3
    sequence 0, token 1: <bos>⟦ w3⟧ w4
    """
    codes = as_codes_given(code)
    if codes is None:
        raise LabelError(f"{code!r} is a site. Give one of its codes, such as '{code}:0'.")
    if model is not None:
        store.check_model(model)
    title = shown(title or f"Examples of {', '.join(map(str, codes[:4]))}{' …' if len(codes) > 4 else ''}")
    body, lines, components = [], [title], []
    for each in codes:
        place = group_of(store, each)
        contexts = store.contexts(each, n, before=before, after=after, order=order, seed=seed)
        count = len(store.positions(each))
        head, line = heading(each, labels, f"fires at {count:,} of {store.n_tokens:,} tokens ({_percent(count / store.n_tokens)})")
        body.append(head)
        lines.append(line)
        if not contexts:
            body.append(note("no example" if count == 0 else "n=0: no example was asked for"))
            continue
        passages = read(store, contexts, [place.hook_name])
        ks = store.sites[place.hook_name].k
        values = [_similarities(store, model, passage, each, place) for passage in passages] if model is not None else None
        top = max((float(np.nanmax(value, initial=0.0)) for value in values), default=0.0) if values else 0.0
        body.append(
            legend("cosine similarity 0 or less", f"{top:.2f}; underlined: fires")
            if values
            else legend("does not fire", "fires in the first slot", [3, 6, 10])
        )
        for i, passage in enumerate(passages):
            body.append(_row(passage, place, each.code, ks, values[i] if values else None, top))
            lines.append(f"{passage.said(passage.marked or 0)}: {line_of(passage.pieces, [passage.marked or 0])}")
        if count > len(passages):
            body.append(note(f"{len(passages)} of {count:,} places, {'the first' if order == 'first' else 'chosen at random'}"))
        components.append(_component(passages, place, each, ks, values))
    return View(title, "\n".join(lines), fragment(title, body), tuple(components))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _similarities(store: Any, model: Any, passage: Passage, code: Code, place: Group) -> np.ndarray:
    """Run the model over the sequence up to the end of the context, and return the similarities in the context."""
    from tl_codebook.attachment import match_sites

    sequence = store.sequence(passage.sequence)
    stop = sequence.start + passage.first + len(passage.pieces)
    whole = read(model, torch.as_tensor(store.tokens(sequence.start, stop)), [place.hook_name], "a sequence of the store")[0]
    vector = match_sites(model, place.hook_name)[0].codebook.codes[place.group, code.code]
    return whole.similarity(place, vector)[passage.first :]


def _row(passage: Passage, place: Group, code: int, k: int, similarity: np.ndarray | None, top: float) -> str:
    spans = []
    for i, (piece, rank) in enumerate(zip(passage.pieces, passage.rank(place, code).tolist(), strict=True)):
        said = [passage.said(i), f"fires in slot {rank}" if rank >= 0 else "does not fire"]
        level = rank_level(rank, k)
        if similarity is not None:
            said.append(f"similarity {similarity[i]:.3f}")
            level = level_of(float(similarity[i]) / top) if top > 0 else 0
        colour = "nan" if similarity is not None and np.isnan(similarity[i]) else f"a{level}" if level else ""
        spans.append(token_span(piece, colour, said, fires=rank >= 0, marked=i == passage.marked, breaks=False))
    place_text = f"{shown(passage.where)}<br>token {passage.first + (passage.marked or 0):,}"
    return f'<div class="row"><div class="place">{place_text}</div>{text_block(spans, tight=True)}</div>'


def _component(passages: list[Passage], place: Group, code: Code, k: int, values: list[np.ndarray] | None) -> Component:
    columns = [rank_values(passage.rank(place, code.code), k) for passage in passages]
    if values is not None:
        columns = [[float(each) if np.isfinite(each) else 0.0 for each in value] for value in values]
    props = {
        "tokens": [[inert(piece) for piece in passage.pieces] for passage in passages],
        "activations": [[[[each]] for each in column] for column in columns],
        "firstDimensionName": "Codebook",
        "secondDimensionName": "Code",
        "firstDimensionLabels": [inert(place)],
        "secondDimensionLabels": [str(code.code)],
    }
    return Component("TextNeuronActivations", props, f"{code}: {'similarity' if values is not None else 'slot'}")
