"""How many codes are chosen at a step: many at first, the codebooks' own number in the end."""

from __future__ import annotations

from typing import Any

from tl_codebook.attachment import sites
from tl_codebook.codebook import Codebook
from tl_codebook.errors import ConfigError
from tl_codebook.training.config import CodebookTrainingConfig

__all__ = ["KSchedule", "k_at_step"]


def k_at_step(step: int, *, k_start: int, k_end: int, decay_steps: int, power: float = 1.0) -> int:
    """Return the number of codes of a step: `k_start` at step 0, `k_end` from step ``decay_steps - 1`` on, rounded down between.

    Args:
        step: Counted from 0.
        k_start, k_end: The first and the last number, k_start >= k_end >= 1.
        decay_steps: Steps of the fall, both ends counted, >= 1; 1 is `k_end` from the start, where the original divides by zero.
        power: Shape of the fall, > 0: the share of it that lies behind is that of the steps to the power of 1 / `power`.

    Source: codebook-features 0.1.2, ``MulticodeKScheduler``, whose numbers never reached the model.

    >>> [k_at_step(step, k_start=10, k_end=2, decay_steps=5) for step in range(6)]
    [10, 8, 6, 4, 2, 2]
    """
    share = 1.0 if step >= decay_steps - 1 else (step / (decay_steps - 1)) ** (1 / power)
    return int(k_start - (k_start - k_end) * share)


class KSchedule:
    """Sets how many codes the codebooks of a host choose, step by step; off where the configuration has no `k_start`.

    Raises:
        ConfigError: `k_start` is more than the codes of a codebook, or less than its k.
    """

    def __init__(self, model: Any, config: CodebookTrainingConfig):
        self.config = config
        self.books: list[Codebook] = [point.codebook for point in sites(model).values()]
        start = config.k_start
        for book in self.books:
            own = book.config
            if start is not None and not own.k <= start <= own.n_codes:
                raise ConfigError(
                    f"k_start={start} was asked for, and {book.label} has k={own.k} of n_codes={own.n_codes}. A k schedule falls to k: "
                    f"give {own.k} to {own.n_codes}."
                )

    def at(self, step: int) -> list[int]:
        """Return the k of every codebook at a step, counted from 0."""
        start, steps, power = self.config.k_start, self.config.k_decay_steps, self.config.k_decay_power
        ends = [book.config.k for book in self.books]
        if start is None or steps is None:
            return ends
        return [k_at_step(step, k_start=start, k_end=end, decay_steps=steps, power=power) for end in ends]

    def set_(self, step: int) -> None:
        """Have the codebooks choose as many codes as the step, counted from 0, asks for."""
        if self.config.k_start is not None:
            for book, k in zip(self.books, self.at(step), strict=True):
                book.k_now = k

    def restore(self) -> None:
        """Have the codebooks choose their own k again: for an evaluation, a checkpoint, the end."""
        if self.config.k_start is not None:
            for book in self.books:
                book.k_now = None

    def figures(self, step: int) -> dict[str, float]:
        """Return what a log of a step should say: the mean k of the codebooks, where a schedule changes it."""
        ks = self.at(step)
        return {} if self.config.k_start is None else {"k": sum(ks) / len(ks)}
