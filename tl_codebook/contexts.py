"""Run a model with its codebooks off, with padding left out, or with what fires counted, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from tl_codebook.attachment import match_sites
from tl_codebook.usage import Usage

__all__ = ["bypassed", "count_usage", "masked"]


@contextmanager
def bypassed(model: Any, names: str | Iterable[str] | None = None) -> Iterator[Any]:
    """Run the model without its codebooks (or without those that `names` match) inside the ``with`` block.

    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> before = model(tokens)
    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> with bypassed(model):
    ...     torch.equal(model(tokens), before)
    True
    """
    points = match_sites(model, names)
    before = [point.enabled for point in points]
    try:
        for point in points:
            point.enabled = False
        yield model
    finally:
        for point, enabled in zip(points, before, strict=True):
            point.enabled = enabled


@contextmanager
def masked(model: Any, mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None) -> Iterator[Any]:
    """Leave the positions where `mask` is 0 (padding) out of usage counts and loss terms inside the ``with`` block.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> with masked(model, torch.tensor([[1, 1, 0]])), count_usage(model) as usage:
    ...     _ = model(torch.tensor([[1, 2, 0]]))
    >>> int(usage["blocks.0.hook_mlp_out"].n_vectors)
    2
    """
    before = [(point.codebook, point.codebook.token_mask) for point in match_sites(model)]
    try:
        for book, _ in before:
            book.token_mask = None if mask is None else mask.bool()
        yield model
    finally:
        for book, outer in before:
            book.token_mask = outer


@contextmanager
def count_usage(model: Any, names: str | Iterable[str] | None = None) -> Iterator[dict[str, Usage]]:
    """Count afresh which codes fire inside the ``with`` block, in evaluation too, and give the counts by hook name.

    They can be read inside the block and after it; the codebooks' own totals are left as they were.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> with count_usage(model) as usage:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> int(usage["blocks.0.hook_mlp_out"].counts.sum())  # 3 positions, k=2
    6
    """
    books = {point.site: point.codebook for point in match_sites(model, names)}
    before = [(book, book.usage, book.count_when) for book in books.values()]
    try:
        for book in books.values():
            book.usage = type(book.usage)(book.n_groups, book.n_codes, book.d_group, book.codes.device)
            book.count_when = "always"
        yield {name: book.usage for name, book in books.items()}
    finally:
        for book, usage, when in before:
            book.usage, book.count_when = usage, when
