"""What can only be seen when the model runs: where a code fits best, and what forcing it does to the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from tl_codebook.attachment import sites
from tl_codebook.describe.logits import LogitRow, extremes
from tl_codebook.describe.places import places_without, rows_ending_at
from tl_codebook.describe.weights import final_norm
from tl_codebook.describe.words import Words
from tl_codebook.errors import ConfigError, DataError, NonFiniteError
from tl_codebook.hosts import n_layers
from tl_codebook.interventions import force_code
from tl_codebook.names import Code, codes_hook, hook_name, input_hook
from tl_codebook.points import CodebookPoint
from tl_codebook.steering import run_rows
from tl_codebook.store.counting import nearest_in_use
from tl_codebook.store.store import CodeStore

__all__ = ["MOST_TOKENS", "N_PLACES", "Fits", "ForcingEffect", "fits_at", "forcing_effect"]

MOST_TOKENS, N_PLACES = 64, 64
"""Tokens that a place is run with, itself the last, and places that are run."""
_ROWS = 16  # of one pass

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class ForcingEffect:
    """What forcing a code at the last token of contexts in which it is absent does to the next token: means over the contexts."""

    n_places: int
    kl: float
    """Kullback-Leibler divergence of the next token's distributions, KL(forced || not forced), nats."""
    control_kl: float | None
    """The same for other codes of the group, of equal frequency; None where there is no other."""
    raises: tuple[LogitRow, ...]
    """The tokens whose log-probability rises most: `logit` is the mean change, nats."""
    lowers: tuple[LogitRow, ...]
    """Those whose log-probability falls most, the same way."""
    slot: int = -1
    """The slot that was forced, as for `force_code`: -1 replaces the least similar code, the others of the place stay."""


class Fits(NamedTuple):
    """How well a code fits the places at which it fires, where the model runs on the end of their contexts alone."""

    similarity: Float[Tensor, " place"]
    """Cosine of the code and what it was chosen for; NaN where it does not fire in the shorter context."""
    scale: Float[Tensor, " place"]
    """What the final norm divides by there; NaN where it is neither a LayerNorm nor an RMSNorm."""


def fits_at(host: Any, store: CodeStore, code: Code, positions: Int64[np.ndarray, " place"]) -> Fits:
    """Run the model over the contexts of some places, and measure there how well a code fits and how large the residual stream is."""
    point, last = sites(host)[code.hook_name], hook_name(n_layers(host) - 1, "resid_post")
    try:
        norm = final_norm(host)
    except ConfigError:
        norm = None
    result = Fits(torch.full((len(positions),), torch.nan), torch.full((len(positions),), torch.nan))
    for index, tokens in _batches(host, store, positions):
        notes, found = _noting(codes_hook(point.site), input_hook(point.site), last)
        _run(host, tokens, notes)
        ids, x = (_group(found[str(name)], tokens, point, code) for name in (codes_hook(point.site), input_hook(point.site)))
        result.similarity[index] = _similarity(point, code, x, ids).cpu()
        if norm is not None:
            stream = found[last].reshape(len(tokens), -1, int(host.cfg.d_model))[:, -1].float()
            result.scale[index] = norm.scale(stream).cpu()
    return result


def _similarity(point: CodebookPoint, code: Code, x: Float[Tensor, "row d_group"], ids: Int[Tensor, "row slot"]) -> Float[Tensor, " row"]:
    """Return the cosine of a code and what it was chosen for: the input, less the codes before it where these are a pursuit."""
    book, group = point.codebook, code.group or 0
    whole = torch.zeros(len(x), book.n_groups, book.d_group, dtype=x.dtype, device=x.device)
    whole[:, group] = x
    y, codes = book.normalise(whole)[:, group].detach(), book.codes[group].detach()
    holds = ids == code.code
    slot = holds.int().argmax(1)
    if book.config.selection == "residual":
        earlier = torch.arange(ids.shape[1], device=ids.device) < slot.unsqueeze(1)
        y = y - (codes[ids.clamp(min=0)] * (earlier & (ids >= 0)).unsqueeze(-1)).sum(1)
    cosine = torch.nn.functional.cosine_similarity(y.float(), codes[code.code].float().unsqueeze(0), dim=-1)
    return torch.where(holds.any(1), cosine.clamp(-1, 1), torch.nan)


def forcing_effect(
    host: Any, store: CodeStore, code: Code, counts: Int64[np.ndarray, " code"], words: Words, n: int, rng: np.random.Generator
) -> ForcingEffect | None:
    """Force a code at the last token of up to `N_PLACES` contexts in which it is absent; None where there is no such place.

    The control forces, at each place, a code drawn from the ten of its group whose counts are the nearest, one that is absent there where
    there is such.
    """
    point = sites(host)[code.hook_name]
    places = places_without(store, store.positions(code), N_PLACES, rng)
    near = torch.as_tensor(nearest_in_use(counts, code.code, rng.permutation(len(counts))))
    change, kl, control = torch.zeros(int(host.cfg.d_vocab), dtype=torch.float64), list[Tensor](), list[Tensor]()
    for _, tokens in _batches(host, store, places):
        notes, found = _noting(codes_hook(point.site))
        before = _run(host, tokens, notes)
        ids = _group(found[str(codes_hook(point.site))], tokens, point, code).cpu()
        absent = ~(ids == code.code).any(1)  # in the shorter context other codes may fire than in the store
        tokens, before, ids = tokens[absent], before[absent], ids[absent]
        if not len(tokens):
            continue
        after = _run(host, tokens, [force_code(code, pos=-1)])
        change += _less(after, before).sum(0)
        kl.append(_kl(after, before))
        if len(near):
            control.append(_kl(_run(host, tokens, _others(code, near, ids, tokens.shape[1], rng)), before))
    if not kl:
        return None
    mean = change / sum(map(len, kl))
    if not bool(torch.isfinite(mean).all()):
        raise _not_finite()
    above, below = extremes(mean, n, words)
    raises, lowers = tuple(row for row in above if row.logit > 0), tuple(row for row in below if row.logit < 0)
    return ForcingEffect(sum(map(len, kl)), _mean(kl), _mean(control) if control else None, raises, lowers)


def _others(code: Code, near: Tensor, ids: Int[Tensor, "row slot"], length: int, rng: np.random.Generator) -> list[Hook]:
    """Return hooks that force in each row, at its last token, one of the codes `near`."""
    masks: dict[int, Bool[Tensor, "row pos"]] = {}
    for row, there in enumerate(ids):
        free = near[~torch.isin(near, there)]
        drawn = int(rng.choice((free if len(free) else near).numpy()))
        masks.setdefault(drawn, torch.zeros(len(ids), length, dtype=torch.bool))[row, -1] = True
    return [force_code(Code(code.layer, code.site, code.group, other), pos=mask) for other, mask in masks.items()]


def _batches(
    host: Any, store: CodeStore, positions: Int64[np.ndarray, " place"]
) -> Iterator[tuple[Int[Tensor, " row"], Int[Tensor, "row pos"]]]:
    """Return the contexts of some places, a batch of one length at a time, and which places they are."""
    vocabulary = int(host.cfg.d_vocab)
    rows = rows_ending_at(store, positions, min(MOST_TOKENS, int(getattr(host.cfg, "n_ctx", None) or MOST_TOKENS)))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for start in range(0, len(same), _ROWS):
            index = same[start : start + _ROWS]
            tokens = torch.as_tensor(np.stack([rows[i] for i in index]))
            if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
                raise DataError(
                    f"the store holds token {int(tokens.max())}, but the model's vocabulary is 0 to {vocabulary - 1}. Give the model that "
                    "it was collected with."
                )
            yield torch.as_tensor(index), tokens


def _run(host: Any, tokens: Int[Tensor, "row pos"], hooks: Sequence[Hook]) -> Float[Tensor, "row vocabulary"]:
    """Return the log-probabilities of the next token, float64 on the CPU."""
    return run_rows(host, tokens, hooks)[:, -1].cpu().double().log_softmax(-1)


def _noting(*names: str) -> tuple[list[Hook], dict[str, Tensor]]:
    """Return hooks that note what passes at some hook points, and where they note it."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            found[str(name)] = value.detach()

        return hook

    return [(name, note(name)) for name in names], found


def _group(value: Tensor, tokens: Int[Tensor, "row pos"], point: CodebookPoint, code: Code) -> Tensor:
    """Return what the group of a code has at the last token of each row, from what passed at `hook_codes` or `hook_x`."""
    return value.reshape(*tokens.shape, point.codebook.n_groups, -1)[:, -1, code.group or 0]


def _less(after: Tensor, before: Tensor) -> Tensor:
    """Return the difference of log-probabilities; a token that is impossible in both changes by nothing."""
    return torch.where(after == before, 0.0, after - before)


def _kl(after: Tensor, before: Tensor) -> Float[Tensor, " row"]:
    return torch.where(after == -torch.inf, 0.0, after.exp() * _less(after, before)).sum(-1).clamp(min=0)


def _mean(parts: Sequence[Tensor]) -> float:
    value = torch.cat(list(parts)).mean()
    if not bool(torch.isfinite(value)):
        raise _not_finite()
    return float(value)


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "forcing a code gave a next token that is not finite: NaN logits, or a token that is ruled out in one of two runs. Look at the "
        "logits of the model; describe_code without measure=True needs none."
    )
