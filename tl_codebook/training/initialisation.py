"""Start codes from the base's own activations.

k-means per site; where selection is residual, stage by stage: the first part of the codes fits the activations, the next what the first
left over, and so on (so that greedy pursuit finds a coarse code first and finer ones after). Assignment uses the snap of this package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_codebook import hosts
from tl_codebook.attachment import match_sites
from tl_codebook.codebook import Codebook
from tl_codebook.contexts import bypassed
from tl_codebook.errors import DataError, NonFiniteError
from tl_codebook.points import CodebookPoint
from tl_codebook.snap import decode, select

__all__ = ["collect_inputs", "fit_codes", "initialise_codes_", "kmeans", "spread_centres", "stage_sizes"]

_DRAWS = 1024  # of centres, before several are drawn at a time
_ROUNDING = 1e-6  # |x|^2 - 2xc + |c|^2 of two equal vectors is this small, not 0
_BYTES_AT_ONCE = 2**30  # activations held at a time; more sites than fit take more passes over the tokens


def stage_sizes(n_codes: int, k: int) -> list[int]:
    """Share codes out over the stages of greedy pursuit, the first ones getting more (in the ratio 1, 1/2, 1/3, ...).

    >>> stage_sizes(256, 4)
    [125, 61, 40, 30]
    """
    weights = [1 / (stage + 1) for stage in range(k)]
    sizes = [max(1, int(n_codes * weight / sum(weights))) for weight in weights]
    while sum(sizes) > n_codes:
        sizes[sizes.index(max(sizes))] -= 1
    sizes[0] += n_codes - sum(sizes)
    return sizes


def spread_centres(
    x: Float[Tensor, "n group d_group"], n_centres: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "group n_centres d_group"]:
    """Choose vectors as centres, each with a probability that grows with the square of its distance to those chosen before it.

    Centres at random fall together where vectors are many and miss clusters where they are few; Lloyd's algorithm repairs neither. Where
    all vectors are centres already the rest are copies with a little noise (codes that are exactly alike can never part).

    Source: k-means++ (Arthur and Vassilvitskii 2007). Beyond 1,024 centres several are drawn at a time.

    >>> x = torch.tensor([[0.0], [0.0], [0.0], [9.0]]).unsqueeze(1)
    >>> sorted(spread_centres(x, 2).flatten().tolist())
    [0.0, 9.0]
    """
    n, n_groups, d_group = x.shape
    grouped = x.transpose(0, 1)
    here = torch.arange(n_groups, device=x.device).unsqueeze(-1)
    centres = x.new_empty(n_groups, n_centres, d_group)
    squares = grouped.square().sum(-1)
    nearest = x.new_full((n_groups, n), torch.inf)
    at_once, done = math.ceil(n_centres / _DRAWS), 0
    while done < n_centres:
        m = 1 if done == 0 else min(at_once, n_centres - done)
        weights = torch.ones_like(nearest) if done == 0 else nearest
        all_taken = weights.sum(-1, keepdim=True) == 0
        rows = torch.multinomial(weights.masked_fill(all_taken, 1.0).double().cpu(), m, replacement=True, generator=generator).to(x.device)
        new = grouped[here, rows]
        noise = torch.randn(new.shape, generator=generator).to(x.device) if bool(all_taken.any()) else 0.0
        new = new + all_taken.unsqueeze(-1) * (1e-3 * x.std(unbiased=False) * noise)
        centres[:, done : done + m] = new
        lengths = new.square().sum(-1)
        size = squares + lengths.amax(-1, keepdim=True)
        distance = (squares.unsqueeze(-1) + lengths.unsqueeze(-2) - 2 * grouped @ new.transpose(-1, -2)).amin(-1)
        nearest = torch.minimum(nearest, distance.where(distance > _ROUNDING * size, 0.0))
        done += m
    return centres


def kmeans(
    x: Float[Tensor, "n group d_group"], n_centres: int, *, n_iterations: int = 10, generator: torch.Generator | None = None
) -> Float[Tensor, "group n_centres d_group"]:
    """Fit centres to vectors by Lloyd's algorithm, each group by itself; an empty centre moves to a badly fitted vector.

    With fewer distinct vectors than centres the rest are copies with a little noise.
    """
    _, n_groups, _ = x.shape
    centres = spread_centres(x, n_centres, generator=generator)
    for _ in range(n_iterations):
        ids = select(x, centres, 1, selection="nearest").squeeze(-1)
        for group in range(n_groups):
            assigned, vectors = ids[:, group], x[:, group]
            counts = torch.bincount(assigned, minlength=n_centres)
            sums = torch.zeros_like(centres[group]).index_add_(0, assigned, vectors)
            new = sums / counts.clamp(min=1).unsqueeze(-1)
            empty = (counts == 0).nonzero().squeeze(-1)
            if len(empty):
                error = (vectors - centres[group][assigned]).square().sum(-1)
                picks = min(len(empty), int((error > 0).sum()))
                new[empty] = centres[group][empty]
                if picks:
                    chosen = torch.multinomial(error.cpu().double(), picks, generator=generator).to(x.device)
                    new[empty[:picks]] = vectors[chosen]
            centres[group] = new
    return centres


def fit_codes(
    book: Codebook, y: Float[Tensor, "n group d_group"], *, n_iterations: int = 10, generator: torch.Generator | None = None
) -> Float[Tensor, "group code d_group"]:
    """Return codes that fit the (normalised) inputs `y` of a codebook, by k-means or by k-means in stages."""
    distinct = int(torch.unique(y[: 2 * book.n_codes].flatten(1), dim=0).shape[0])
    if distinct < book.n_codes:  # among the first ones; look at all before saying so
        distinct = int(torch.unique(y.flatten(1), dim=0).shape[0])
    if distinct < book.n_codes:
        warnings.warn(
            f"{book.label or 'a codebook'}: {distinct} distinct inputs for {book.n_codes} codes; the other codes start as noisy copies and "
            "may stay dead. Use fewer codes, or more varied tokens.",
            stacklevel=2,
        )
    if book.config.selection == "nearest":
        return kmeans(y, book.n_codes, n_iterations=n_iterations, generator=generator)
    rest, parts = y, []
    for size in stage_sizes(book.n_codes, book.k):
        centres = kmeans(rest, size, n_iterations=n_iterations, generator=generator)
        rest = rest - decode(select(rest, centres, 1, selection="nearest"), centres)
        parts.append(centres)
    return torch.cat(parts, dim=1)


def collect_inputs(
    model: Any, tokens: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"] | None, points: Sequence[CodebookPoint], batch_size: int = 16
) -> dict[str, Float[Tensor, "n group d_group"]]:
    """Run the model without its codebooks and return what would go into them, padding left out, on the CPU.

    Raises:
        NonFiniteError: some of it is NaN or Inf; it would be a code.
    """
    found: dict[str, list[Tensor]] = {point.site: [] for point in points}
    with bypassed(model):
        for start in range(0, tokens.shape[0], batch_size):
            rows = tokens[start : start + batch_size]
            got = hosts.raw_activations(model, rows.to(hosts.home_device(model, "hook_embed")), list(found))
            for point in points:
                book, value = point.codebook, got[point.site]
                flat = value.reshape(rows.numel(), book.d_in)
                if mask is not None:
                    flat = flat[mask[start : start + batch_size].reshape(-1).to(flat.device)]
                with torch.no_grad():
                    y = book.normalise(point.in_basis(flat.to(book.codes.device))).float().cpu()
                n_wrong = int((~y.isfinite()).flatten(1).any(-1).sum())
                if n_wrong:
                    raise NonFiniteError(
                        f"{point.site}: the activations that its codes are to start from hold NaN or Inf, at {n_wrong} of {len(y)} tokens. "
                        "Look for NaN among the weights of the base; in half precision run it in fp32."
                    )
                found[point.site].append(y)
    return {site: torch.cat(parts) for site, parts in found.items()}


def initialise_codes_(
    model: Any,
    tokens: Int[Tensor, "row pos"],
    *,
    mask: Bool[Tensor, "row pos"] | None = None,
    names: str | Iterable[str] | None = None,
    n_iterations: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Set the codes of a model's codebooks to fit the activations of its base on `tokens`.

    Args:
        model: A host with codebooks.
        tokens: Rows to run; about 16,000 tokens are plenty for 1,024 codes.
        mask: False at padding.
        names: Hook names, addresses or sites; all by default.
        n_iterations: Lloyd iterations of each k-means.
        seed: Of the centres' first places.

    Raises:
        DataError: no tokens were given.
        NonFiniteError: the base has NaN or Inf at a site.

    Source: k-means as in the original library's optional initialisation; stages as in residual quantisation.

    >>> from tl_codebook import attach
    >>> books = attach(model, "mlp_out", n_codes=16, k=2)
    >>> initialise_codes_(model, torch.randint(0, 61, (4, 32)), progress=False)
    >>> books["blocks.0.hook_mlp_out"].fresh
    False
    """
    if tokens.numel() == 0 or (mask is not None and not bool(mask.any())):
        raise DataError("no tokens were given to start the codes from. Give at least one row.")
    model = hosts.as_host(model)
    points = match_sites(model, names)
    size = {point.site: 4 * tokens.numel() * point.codebook.d_in for point in points}
    bar = tqdm(total=len(points), desc="codes from k-means", unit="site", disable=not progress)
    while points:
        batch = [points.pop(0)]
        while points and sum(size[p.site] for p in batch) + size[points[0].site] <= _BYTES_AT_ONCE:
            batch.append(points.pop(0))
        inputs = collect_inputs(model, tokens, mask, batch)
        for point in batch:
            book = point.codebook
            generator = torch.Generator().manual_seed(seed)
            codes = fit_codes(book, inputs.pop(point.site).to(book.codes.device), n_iterations=n_iterations, generator=generator)
            with torch.no_grad():
                book.codes.copy_(codes)
            book.fresh = False
            bar.update()
    bar.close()
