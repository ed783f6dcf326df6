"""What a code does to the logits by itself: the way from its vector through the final norm and the unembedding, past all later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_codebook.attachment import match_sites, sites
from tl_codebook.codebook import Codebook
from tl_codebook.describe.weights import logit_path
from tl_codebook.describe.words import Words
from tl_codebook.errors import ConfigError, NonFiniteError
from tl_codebook.hosts import as_host
from tl_codebook.names import Code, CodeLike, as_code
from tl_codebook.store.sites import stored_code

__all__ = ["LogitRow", "book_of", "contribution", "direct_logit_effect", "extremes"]


@dataclass(frozen=True)
class LogitRow:
    """A token and what a code does to it: what it adds to the logit by itself, or to the log-probability (nats) where it is forced."""

    token: int
    text: str | None
    """None where the store has no text."""
    logit: float


def book_of(model: Any, code: CodeLike) -> tuple[Code, Codebook]:
    """Return a code as labels write it (no group where there is one), and its codebook.

    Raises:
        UnknownHookError: no codebook sits there.
        LabelError, InvalidCodeError: the codebook has no such group or code, or several groups of which none is named.
        NonFiniteError: its codes hold NaN or Inf.
    """
    code, points = as_code(code), sites(model)
    match_sites(model, code.hook_name)  # raises where no codebook sits
    book = points[code.hook_name].codebook
    code = stored_code({code.hook_name: book}, code, holder="the model")
    if not bool(torch.isfinite(book.codes[code.group or 0].detach()).all()):
        raise NonFiniteError(f"the codes of {code.address} hold NaN or Inf, of which nothing can be said. Load a checkpoint from before.")
    return code, book


def contribution(book: Codebook, code: Code) -> Float[Tensor, "1 d_in"]:
    """Return what one slot that holds a code adds at its site: its vector, zero in other groups, over k where codes are averaged."""
    group = code.group or 0
    vector = torch.zeros(1, book.d_in, dtype=book.codes.dtype, device=book.codes.device)
    vector[0, group * book.d_group : (group + 1) * book.d_group] = book.codes[group, code.code].detach()
    return vector / book.k if book.config.reduce == "mean" else vector


def direct_logit_effect(model: Any, code: CodeLike, *, scale: float | None = None) -> Float[Tensor, " vocabulary"]:
    """Return what a code adds to each logit by itself, without what later layers make of it.

    The code's vector goes into the residual stream (from z through W_O of its head, from post through W_out), through the final norm's
    linear part (centring, weight), is divided by the norm's scale, and goes through W_U. For a given scale this is exact: it is the change
    of the logits when the code is added at the last layer while the scale is held. A logit soft cap (Gemma 2), which would bend it, is left
    out; so are biases, which no code changes, and codebooks at later resid sites, which choose anew what passes. Where codes are averaged
    it is the effect of one slot, 1/k of the vector. At v it is what the head writes where it attends to that position alone. Only the
    differences between tokens say anything: what is added to all logits alike changes no probability.

    The weights are read off the model and proven on a probe of eight tokens: a model with another norm or a factor on the way is refused.

    Args:
        model: A host with codebooks.
        code: A `Code` or a label.
        scale: What the final norm divides by, > 0; it differs from place to place. By default 1: the result is in units of it.

    Raises:
        ConfigError: a scale that cannot be; a site that writes nothing (q, k, qkv), v where key-value heads serve several heads; a way to
            the logits that is not linear.
        UnknownHookError, LabelError, InvalidCodeError: no such codebook, group or code.
        NonFiniteError: codes that hold NaN or Inf.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (the direct path); nostalgebraist 2020 (logit lens).

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> effect = direct_logit_effect(model, "L1.mlp_out:3")
    >>> effect.shape, torch.allclose(direct_logit_effect(model, "L1.mlp_out:3", scale=2.0), effect / 2)
    (torch.Size([61]), True)
    """
    host = as_host(model)
    code, book = book_of(host, code)
    divisor = 1.0 if scale is None else scale
    if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not 0 < divisor < float("inf"):
        raise ConfigError(f"scale={scale!r} was asked for. Give what the final norm divides by, above 0, or leave it out.")
    return logit_path(host, code.hook_name).logits(contribution(book, code))[0] / divisor


def extremes(values: Float[Tensor, " vocabulary"], n: int, words: Words) -> tuple[tuple[LogitRow, ...], tuple[LogitRow, ...]]:
    """Return the `n` tokens with the greatest values, greatest first, and those with the least, least first; equals by id.

    >>> above, below = extremes(torch.tensor([0.0, 2.0, -1.0]), 1, Words(None))
    >>> above[0].token, below[0].logit
    (1, -1.0)
    """
    values = values.detach().double().cpu()
    chosen = (values.argsort(descending=True, stable=True)[:n].tolist(), values.argsort(stable=True)[:n].tolist())
    above, below = (tuple(LogitRow(i, words.text([i]), float(values[i])) for i in some) for some in chosen)
    return above, below
