"""Everything that is known of one code, on one page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tl_codebook.codebook import Codebook
from tl_codebook.describe.association import (
    CodeRow,
    TokenRow,
    code_counts_of_text,
    code_rows,
    neighbours,
    token_counts,
    token_rows,
    tokens_at,
)
from tl_codebook.describe.logits import LogitRow, book_of, contribution, extremes
from tl_codebook.describe.measured import N_PLACES, ForcingEffect, fits_at, forcing_effect
from tl_codebook.describe.places import CodeContext, Firings, context_at
from tl_codebook.describe.weights import logit_path
from tl_codebook.describe.words import Words, shown
from tl_codebook.errors import ConfigError, check_whole
from tl_codebook.hosts import as_host
from tl_codebook.names import Code, CodeLike, as_code
from tl_codebook.store.sites import stored_code
from tl_codebook.store.store import CodeStore

__all__ = ["CodeDescription", "SimilarCode", "describe_code"]

_MOST_FIRINGS = 10_000
"""So many firings are looked at closely; of more, so many are drawn."""


@dataclass(frozen=True)
class SimilarCode:
    """Another code of the same group and how alike the two vectors are."""

    label: str
    cosine: float
    """-1 to 1; 0 for a code of zeros."""
    count: int
    """Positions of text at which it fires."""
    dead: bool
    """It fires nowhere in the store, at special tokens neither."""


@dataclass(frozen=True)
class CodeDescription:
    """What is known of one code. ``print`` shows it; `as_dict` is JSON. What needs a model is empty, or None, without one.

    Tables begin with what says most: the greatest share times PMI.
    """

    code: Code
    count: int
    """Positions of text at which it fires; special tokens (BOS) are none."""
    frequency: float
    """Share of the positions of text, 0 to 1."""
    n_special: int
    """Special tokens at which it fires, which nothing else here counts."""
    rank: int
    """By use among the codes of its group: 1 for the most used."""
    n_codes: int
    """Codes in its group."""
    n_sampled: int
    """Firings that `by_slot`, the tables and the contexts are taken from: all, or 10,000 drawn at random."""
    by_slot: tuple[int, ...]
    """Of these, those that hold the code in each slot, the most similar first."""
    top: tuple[CodeContext, ...]
    """Where it fits best: by slot, then in the order of the text; where `measure` was asked for, by similarity."""
    random: tuple[CodeContext, ...]
    """Places drawn at random, in the order of the text: what the code is like where it is not at its best."""
    tokens: tuple[TokenRow, ...]
    """The tokens at which it fires."""
    n_previous: int
    """Firings with text before them in the sequence, of which `previous` and `before` are shares; the others begin a text."""
    previous: tuple[TokenRow, ...]
    """The tokens before these."""
    before: tuple[CodeRow, ...]
    """Codes of its group at the position before."""
    n_next: int
    """Firings with text after them in the sequence, of which `after` are shares."""
    after: tuple[CodeRow, ...]
    """Codes of its group at the position after."""
    similar: tuple[SimilarCode, ...] = ()
    """The codes of its group whose vectors have the greatest cosine with its own."""
    raises: tuple[LogitRow, ...] = ()
    """The tokens to whose logits it adds most by itself (`direct_logit_effect`)."""
    lowers: tuple[LogitRow, ...] = ()
    """The tokens from whose logits it takes most."""
    scale: float | None = None
    """What the final norm divides by where the code fires, the mean of the places that were run, and what `raises` and `lowers` are divided
    by; None where it was not measured, and these are in units of the final norm's scale."""
    effect: ForcingEffect | None = None
    notes: tuple[str, ...] = ()
    """Why something is missing."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values, the code as its label."""
        return {**_plain(dataclasses.asdict(self)), "code": str(self.code)}

    def __str__(self) -> str:
        lines = [f"{self.code}: fires at {self.count:,} positions of text ({self.frequency:.3%}), rank {self.rank:,} of {self.n_codes:,}"]
        if self.n_special:
            lines[0] += f", and at {self.n_special:,} special tokens"
        if self.n_sampled < self.count:
            lines.append(f"  tables and contexts: of {self.n_sampled:,} firings drawn at random")
        units = "in units of the final norm's scale" if self.scale is None else f"at a final norm's scale of {self.scale:.3g}"
        begin, end = (
            f" (of {n:,} places; {self.n_sampled - n:,} {what} a text)" if n < self.n_sampled else ""
            for n, what in ((self.n_previous, "begin"), (self.n_next, "end"))
        )
        parts: list[tuple[str, Sequence[str]]] = [
            ("by slot", [f"{count:,}" for count in self.by_slot] if self.n_sampled else []),
            ("tokens (share, PMI in bits)", [f"{shown(row.token, row.text)} {row.share:.1%} {row.pmi:+.1f}" for row in self.tokens]),
            (f"previous tokens{begin}", [f"{shown(row.token, row.text)} {row.share:.1%} {row.pmi:+.1f}" for row in self.previous]),
            (f"codes before{begin}", [f"{row.label} {row.share:.1%} {row.pmi:+.1f}" for row in self.before]),
            (f"codes after{end}", [f"{row.label} {row.share:.1%} {row.pmi:+.1f}" for row in self.after]),
            ("similar codes", [f"{row.label} {row.cosine:+.2f}{' (dead)' if row.dead else ''}" for row in self.similar]),
            (f"raises directly, {units}", [f"{shown(row.token, row.text)} {row.logit:+.2f}" for row in self.raises]),
            (f"lowers directly, {units}", [f"{shown(row.token, row.text)} {row.logit:+.2f}" for row in self.lowers]),
        ]
        lines += [f"  {name}: {', '.join(rows)}" for name, rows in parts if rows]
        if self.effect is not None:
            control = "no other code" if self.effect.control_kl is None else f"another of equal frequency {self.effect.control_kl:.3g}"
            lines.append(
                f"  forced at {self.effect.n_places} places (slot {self.effect.slot}), next token: KL {self.effect.kl:.3g} nats, {control}"
            )
            for name, changes in (("up", self.effect.raises), ("down", self.effect.lowers)):
                if changes:
                    lines.append(f"    {name}: {', '.join(f'{shown(row.token, row.text)} {row.logit:+.2f}' for row in changes)}")
        for name, contexts in (("top", self.top), ("random", self.random)):
            lines += [f"  {name}:"] if contexts else []
            lines += [f"    {_figure(context)}  {context}" for context in contexts]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _figure(context: CodeContext) -> str:
    return f"slot {context.slot}" if context.similarity is None else f"{context.similarity:+.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def describe_code(
    store: CodeStore,
    code: CodeLike,
    model: Any = None,
    *,
    n: int = 10,
    n_contexts: int = 10,
    before: int = 20,
    after: int = 10,
    seed: int = 0,
    measure: bool = False,
) -> CodeDescription:
    """Return what a code stands for: where it fires, with what, and with a model what it does.

    From the store alone: how often it fires, contexts, and the tokens and codes that go with it (`CodeDescription`). Of a code that fires
    more than 10,000 times so many firings are drawn. With a model too: the codes whose vectors are alike, and what the vector does to the
    logits by itself (`direct_logit_effect`). With ``measure=True`` the model runs, on up to 64 tokens that end at the place (a BOS at the
    start stays): over 64 places where the code fires, in the first slots first, to order contexts by similarity (the cosine of the code and
    what it was chosen for) and to find the scale of the final norm; and over up to 64 random places of text where it does not, to force it
    there at the last token as `force_code` does by default (slot -1, the least similar code gives way), beside random codes of its group of
    equal frequency. The model is left as it was.

    Args:
        store: A `CodeStore`.
        code: A `Code` or a label.
        model: The host that the store was collected with, its codebooks attached.
        n: Most rows of a table, >= 1.
        n_contexts: Most contexts of a kind, >= 0.
        before, after: Most tokens before and after the place of a context, >= 0.
        seed: Of all that is drawn, >= 0.
        measure: Run the model.

    Raises:
        UnknownHookError, LabelError, InvalidCodeError: no such code in the store, or a site of the store without a codebook in the model.
        BasisMismatchError: the model has other codes than the store was collected with.
        ConfigError: an option out of range, or `measure` without a model.
        CheckpointError: a damaged store.
        DataError: tokens that the model does not have.
        NonFiniteError: codes that hold NaN or Inf.

    Source: Church and Hanks 1990 (pointwise mutual information); Tamkin et al. 2023, section 4 (contexts, and forcing a code).

    >>> from tl_codebook import attach, collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> code = f"L0.mlp_out:{store.ids('L0.mlp_out')[2, 0, 0]}"  # the most similar code at w4
    >>> page = describe_code(store, code, model)
    >>> 4 in [row.token for row in page.tokens], page.n_codes, len(page.similar), page.effect
    (True, 16, 10, None)
    """
    for name, value, least in (("n", n, 1), ("n_contexts", n_contexts, 0), ("before", before, 0), ("after", after, 0), ("seed", seed, 0)):
        check_whole(name, value, least=least)
    if measure and model is None:
        raise ConfigError("measure=True was asked for without a model to run. Give the model that the store was collected with.")
    code = stored_code(store.sites, as_code(code))
    rng = np.random.default_rng(seed)
    ids = store.ids(code.hook_name)  # once: in each new map of a file all its pages have to be found again
    firings = Firings(store, code, _MOST_FIRINGS, rng, ids)
    if model is not None:
        model = as_host(model)
        store.check_model(model)
        book_of(model, code)
    words, counts = Words.of_store(store), code_counts_of_text(store, code, ids)
    n_text = int(store.n_tokens - store.is_special().sum())
    places, among = firings.sample, token_counts(store)
    earlier, later = (neighbours(store, places, step) for step in (-1, 1))
    drawn = np.sort(rng.choice(len(places), min(n_contexts, len(places)), replace=False))
    best = firings.best(n_contexts)

    def contexts(which: Int64[np.ndarray, " _"], similarity: Sequence[float | None] | None = None) -> tuple[CodeContext, ...]:
        chosen = zip(places[which].tolist(), firings.slots[which].tolist(), similarity or [None] * len(which), strict=True)
        return tuple(context_at(store, place, slot, words, before, after, alike) for place, slot, alike in chosen)

    page = CodeDescription(
        code=code,
        count=len(firings.positions),
        frequency=len(firings.positions) / max(n_text, 1),
        n_special=firings.n_special,
        rank=1 + int((counts > counts[code.code]).sum()),
        n_codes=len(counts),
        n_sampled=len(places),
        by_slot=firings.by_slot,
        top=contexts(best),
        random=contexts(drawn),
        tokens=token_rows(tokens_at(store, places), among.everywhere, words, n),
        n_previous=len(earlier),
        previous=token_rows(tokens_at(store, earlier), among.followed, words, n),
        before=code_rows(ids[earlier, code.group or 0], code, counts, n_text, n),
        n_next=len(later),
        after=code_rows(ids[later, code.group or 0], code, counts, n_text, n),
    )
    if model is None:
        return page
    notes: list[str] = []
    measured: dict[str, Any] = {}
    if measure:
        chosen = firings.best(N_PLACES)
        fits = fits_at(model, store, code, places[chosen])
        fires = ~fits.similarity.isnan()
        if bool(fires.any()):
            order = torch.where(fires, fits.similarity, -2).argsort(descending=True, stable=True)[: min(n_contexts, int(fires.sum()))]
            measured["top"] = contexts(chosen[order.numpy()], [float(value) for value in fits.similarity[order]])
            scale = float(fits.scale[fires].double().mean())
            measured["scale"] = scale if np.isfinite(scale) else None
        else:
            notes.append("no similarity: the code fires at none of the places that were run, so that contexts are ordered by slot.")
        measured["effect"] = forcing_effect(model, store, code, counts, words, n, rng)
        if measured["effect"] is None:
            notes.append("no measured effect: the code fires at every place of text already, so that forcing it changes nothing.")
    _, codebook = book_of(model, code)
    try:
        effect = logit_path(model, code.hook_name).logits(contribution(codebook, code))[0] / (measured.get("scale") or 1.0)
        measured["raises"], measured["lowers"] = extremes(effect, n, words)
    except ConfigError as error:
        notes.append(f"no direct effect on the logits: {error}")
    return dataclasses.replace(page, similar=_similar(store, code, codebook, counts, n), notes=tuple(notes), **measured)


def _similar(store: CodeStore, code: Code, book: Codebook, counts: Int64[np.ndarray, " code"], n: int) -> tuple[SimilarCode, ...]:
    group = code.group or 0
    vectors: Float[Tensor, "code d_group"] = book.codes[group].detach().float()
    cosines = torch.nn.functional.cosine_similarity(vectors, vectors[code.code].unsqueeze(0), dim=-1).clamp(-1, 1).cpu()
    order = [i for i in cosines.argsort(descending=True, stable=True).tolist() if i != code.code][:n]
    everywhere = store.counts(code.hook_name)[group]
    return tuple(
        SimilarCode(str(Code(code.layer, code.site, code.group, i)), float(cosines[i]), int(counts[i]), not everywhere[i]) for i in order
    )
