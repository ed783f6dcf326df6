"""Dead codes, counted against the inputs that can reach them.

A codebook of 10,000 codes at a site that sees 11 different inputs has 9,989 dead codes whatever it learned: the MLP of the first block of a
model with parallel blocks reads one token and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.attachment import match_sites
from tl_codebook.errors import ConfigError, DataError
from tl_codebook.experiments.tokfsm.machine import check_range
from tl_codebook.experiments.tokfsm.text_of_model import run_batches
from tl_codebook.names import input_hook
from tl_codebook.usage import Usage

__all__ = ["DeadCodes", "attainable_inputs", "dead_of_attainable"]

_CHUNK = 256
"""Rows compared at a time: few, as each is compared with all others of its chunk."""


class DeadCodes(NamedTuple):
    """How many codes of a site are in use, of those that could be."""

    used: Int[Tensor, " group"]
    """Codes that fired."""
    attainable: Int[Tensor, " group"]
    """Codes that could have fired at one code a position: one for each different input, and no more than there are."""
    dead: Float[Tensor, " group"]
    """``1 - used / attainable``, 0 to 1; 0 too where several codes a position (k > 1) put more to use than there are inputs."""
    perplexity: Float[Tensor, " group"]
    """The number of codes in equal use."""


class _Distinct:
    """The different vectors of a group seen so far, up to a limit."""

    def __init__(self, limit: int, tolerance: float):
        self.limit, self.tolerance = limit, tolerance
        self.radius = -1.0
        self.seen = torch.empty(0)

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, x: Float[Tensor, "row d_group"]) -> None:
        """Note those of the rows that are near none of the earlier ones."""
        if self.radius < 0:  # of the first batch, so that what counts as one input is the same in all of them
            self.radius = self.tolerance * float(x.square().sum(-1).mean().sqrt())
            self.seen = x[:0]
        for rows in x.split(_CHUNK):
            if len(self.seen) >= self.limit:
                return
            new = rows[~self._near(rows, self.seen).any(1)]
            earlier = self._near(new, new).tril(-1).any(1)
            self.seen = torch.cat([self.seen, new[~earlier]])[: self.limit]

    def _near(self, x: Float[Tensor, "row d_group"], y: Float[Tensor, "other d_group"]) -> Tensor:
        squares = x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * x @ y.T
        return squares <= self.radius**2


def attainable_inputs(
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    names: str | Iterable[str] | None = None,
    *,
    limit: int | None = None,
    tolerance: float = 1e-4,
    batch_size: int = 100,
) -> dict[str, Int[Tensor, " group"]]:
    """Count the different inputs of each codebook, per group, while rows of tokens run.

    The same input comes out of the model with other last bits from batch to batch and position to position, so inputs are one where they
    are closer than `tolerance`, in units of the root mean square norm of the inputs at the site. They are compared by distance, not
    by rounding each coordinate to a grid: of many coordinates some lie at an edge of the grid, where the last bit decides.

    Args:
        model: A host with codebooks.
        tokens: Rows of tokens; what does not occur in them is not counted, so give those on which usage is counted.
        names: Hook names, addresses or sites; all codebooks by default.
        limit: Where to stop counting a group; by default at its number of codes, beyond which an input makes no code attainable.
        tolerance: 1e-7 to below 1; above the noise of the last bits, below what tells two inputs apart.
        batch_size: Rows run at a time, >= 1.

    Returns:
        The number of different inputs [group] by hook name, at most the limit.

    Raises:
        ConfigError: a limit or batch of none, or a tolerance out of range.
        DataError: no tokens.
        UnknownHookError: a name at which no codebook sits.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> counts = attainable_inputs(model, torch.tensor([[1, 2, 3, 4]]), "L0.mlp_out")
    >>> {name: count.tolist() for name, count in counts.items()}
    {'blocks.0.hook_mlp_out': [4]}
    """
    if limit is not None:
        check_range("limit", limit, 1, None, "one input reaches every codebook")
    if not 1e-7 <= tolerance < 1:  # below it float64 distances of near vectors are noise themselves
        raise ConfigError(f"tolerance={tolerance} was asked for, but it is a share of the size of the inputs. Give 1e-7 to below 1.")
    if not tokens.numel():
        raise DataError("no tokens were given, so that nothing reaches a codebook. Give one row or more.")
    points = match_sites(model, names)
    found = {
        point.site: [_Distinct(limit or point.codebook.n_codes, tolerance) for _ in range(point.codebook.n_groups)] for point in points
    }

    def counter(name: str, n_groups: int, d_group: int) -> Any:
        def count(x: Tensor, hook: Any) -> None:
            grouped = x.detach().double().reshape(-1, n_groups, d_group)
            for group, distinct in enumerate(found[name]):
                distinct.add(grouped[:, group])

        return count

    hooks = [(input_hook(p.site), counter(p.site, p.codebook.n_groups, p.codebook.d_group)) for p in points]
    for _ in run_batches(model, tokens, batch_size, hooks):
        if all(len(distinct) >= distinct.limit for groups in found.values() for distinct in groups):
            break  # more rows cannot change what is returned
    return {name: torch.tensor([len(distinct) for distinct in groups]) for name, groups in found.items()}


def dead_of_attainable(usages: Mapping[str, Usage], attainable: Mapping[str, Int[Tensor, " group"]]) -> dict[str, DeadCodes]:
    """Return, per site and group, the share of dead codes among those that the inputs could have brought to use.

    Args:
        usages: What `count_usage` counted.
        attainable: Different inputs of the same sites on the same rows (`attainable_inputs`), each >= 1.

    Raises:
        DataError: a site whose inputs were not counted, or were counted for another number of groups, or none were.

    >>> usage = Usage(n_groups=1, n_codes=1000, d_group=8)
    >>> usage.counts[0, :9] = 5
    >>> dead_of_attainable({"blocks.0.hook_mlp_out": usage}, {"blocks.0.hook_mlp_out": torch.tensor([11])})["blocks.0.hook_mlp_out"].dead
    tensor([0.1818], dtype=torch.float64)
    """
    result = {}
    for name, usage in usages.items():
        if name not in attainable:
            raise DataError(
                f"the usage of {name!r} was given without its inputs, which were counted at {', '.join(attainable) or 'no site'}. "
                f"Count them with attainable_inputs(model, tokens)."
            )
        inputs, counts = attainable[name].cpu(), usage.counts.cpu()
        n_groups, n_codes = counts.shape
        if inputs.shape != (n_groups,) or bool((inputs < 1).any()):
            raise DataError(
                f"inputs {inputs.tolist()} were given for the {n_groups} groups of {name!r}. Give one number, >= 1, for each group."
            )
        used, possible = (counts > 0).sum(1), inputs.clamp(max=n_codes)
        dead = (1 - used.double() / possible).clamp(min=0)
        result[name] = DeadCodes(used, possible, dead, usage.perplexity.cpu())
    return result
