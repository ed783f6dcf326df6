"""Bring dead codes back, at inputs that the living ones fit badly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_codebook.attachment import sites
from tl_codebook.codebook import Codebook

__all__ = ["Reviver", "replace_dead_"]


@torch.no_grad()
def replace_dead_(
    book: Codebook,
    dead: Bool[Tensor, "group code"],
    y: Float[Tensor, "n group d_group"],
    q: Float[Tensor, "n group d_group"],
    generator: torch.Generator,
) -> Bool[Tensor, "group code"]:
    """Move dead codes to inputs `y`, drawn by how badly `q` fits them; return which codes moved.

    With residual selection a code becomes what was left over of its input: that is what the next step of the pursuit looks for.
    """
    moved = torch.zeros_like(dead)
    rest = (y - q).float()
    source = rest if book.config.selection == "residual" else y.float()
    for group in range(book.n_groups):
        gone = dead[group].nonzero().squeeze(-1)
        error = rest[:, group].square().sum(-1).double().cpu()
        n = min(len(gone), int((error > 0).sum()))
        if n:
            rows = torch.multinomial(error, n, generator=generator).to(y.device)
            book.codes[group, gone[:n]] = source[rows, group].to(book.codes.dtype)
            moved[group, gone[:n]] = True
    return moved


class Reviver:
    """Counts which codes fire between two revivals, and revives those that did not; the same on every process.

    Args:
        model: A host with codebooks.
        gather: Turns a tensor [n ...] of this process into that of all, in the order of the processes.
        seed: Of the choice of inputs.
    """

    def __init__(self, model: Any, gather: Callable[[Tensor], Tensor], seed: int = 0):
        self.books = {name: point.codebook for name, point in sites(model).items()}
        self.gather, self.seed = gather, seed
        self.since = {name: book.usage.counts.clone() for name, book in self.books.items()}

    def watch(self, on: bool) -> None:
        """Have the codebooks keep the inputs of their next forward passes (the last one counts)."""
        for book in self.books.values():
            book.keep_inputs = on
            if not on:
                book.last_inputs = None

    def counts(self) -> dict[str, Tensor]:
        """Return how often each code fired since the last revival, over all processes."""
        result = {}
        for name, book in self.books.items():
            fresh = book.usage.counts - self.since[name].to(book.usage.counts.device)
            result[name] = self.gather(fresh.unsqueeze(0)).sum(0)
        return result

    def restore(self, counts: dict[str, Tensor], *, main: bool) -> None:
        """Go on from the counts of a checkpoint; they are those of all processes, so one of them takes them on."""
        for name, book in self.books.items():
            now = book.usage.counts
            self.since[name] = now - counts[name].to(now.device) if main else now.clone()

    def revive_(self, step: int, optimizer: Any = None) -> int:
        """Replace the codes that have not fired since the last call, forget their optimiser state, and return how many there were."""
        total = 0
        counts = self.counts()
        for index, (name, book) in enumerate(self.books.items()):
            dead = counts[name] == 0
            self.since[name] = book.usage.counts.clone()
            if book.last_inputs is None:
                continue
            y, q = (self.gather(part) for part in book.last_inputs)
            if not bool(dead.any()):
                continue
            generator = torch.Generator().manual_seed(hash((self.seed, step, index)) % 2**63)
            moved = replace_dead_(book, dead, y, q, generator)
            total += int(moved.sum())
            state = {} if optimizer is None else optimizer.state.get(book.codes, {})
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
                if isinstance(state.get(key), Tensor):
                    state[key][moved] = 0
        return total
