"""What changes about the codebooks from step to step: how many codes they choose, and how far the output goes to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tl_codebook.attachment import sites
from tl_codebook.codebook import Codebook
from tl_codebook.errors import ConfigError
from tl_codebook.training.config import CodebookTrainingConfig

__all__ = ["KSchedule", "RampSchedule", "Schedule", "k_at_step", "kl_at_step", "schedules", "strength_at_step"]


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


def strength_at_step(step: int, ramp_steps: int) -> float:
    """Return how far from its input to its codes the output of a codebook lies at a step counted from 0: 1 from step `ramp_steps` on.

    >>> [strength_at_step(step, ramp_steps=4) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return 1.0 if step >= ramp_steps else step / ramp_steps


def kl_at_step(step: int, weight: float, kl_steps: int) -> float:
    """Return the weight of the divergence from the base at a step counted from 0: 0 from step `kl_steps` on, always `weight` if that is 0.

    >>> [kl_at_step(step, 4.0, kl_steps=4) for step in range(6)]
    [4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    """
    return weight if kl_steps == 0 else weight * max(0.0, 1 - step / kl_steps)


class Schedule(ABC):
    """Sets an attribute of the codebooks of a host, step by step; off where the configuration asks for no change."""

    name: str
    """Of the figure in a log."""
    attribute: str
    at_rest: Any = None
    """The value of the attribute when no step is being taken."""

    def __init__(self, model: Any, config: CodebookTrainingConfig):
        self.config = config
        self.books: list[Codebook] = [point.codebook for point in sites(model).values()]

    @property
    @abstractmethod
    def on(self) -> bool:
        """Tell whether the configuration asks for a change."""

    @abstractmethod
    def at(self, step: int) -> Sequence[float]:
        """Return the value for every codebook at a step, counted from 0."""

    def set_(self, step: int) -> None:
        """Give the codebooks the values of a step, counted from 0."""
        if self.on:
            for book, value in zip(self.books, self.at(step), strict=True):
                setattr(book, self.attribute, value)

    def restore(self) -> None:
        """Give the codebooks the value at rest: for an evaluation, a checkpoint, the end."""
        if self.on:
            for book in self.books:
                setattr(book, self.attribute, self.at_rest)

    def figures(self, step: int) -> dict[str, float]:
        """Return what a log of a step should say: the mean of the codebooks, where the schedule changes it."""
        values = self.at(step)
        return {self.name: sum(values) / len(values)} if self.on else {}


class KSchedule(Schedule):
    """How many codes the codebooks choose; off where the configuration has no `k_start`.

    Raises:
        ConfigError: `k_start` is more than the codes of a codebook, or less than its k.
    """

    name, attribute = "k", "k_now"

    def __init__(self, model: Any, config: CodebookTrainingConfig):
        super().__init__(model, config)
        start = config.k_start
        for book in self.books:
            own = book.config
            if start is not None and not own.k <= start <= own.n_codes:
                raise ConfigError(
                    f"k_start={start} was asked for, and {book.label} has k={own.k} of n_codes={own.n_codes}. A k schedule falls to k: "
                    f"give {own.k} to {own.n_codes}."
                )

    @property
    def on(self) -> bool:
        """Tell whether k falls."""
        return self.config.k_start is not None

    def at(self, step: int) -> list[int]:
        """Return the k of every codebook at a step, counted from 0."""
        start, steps, power = self.config.k_start, self.config.k_decay_steps, self.config.k_decay_power
        ends = [book.config.k for book in self.books]
        if start is None or steps is None:
            return ends
        return [k_at_step(step, k_start=start, k_end=end, decay_steps=steps, power=power) for end in ends]


class RampSchedule(Schedule):
    """How far the outputs of the codebooks go from the inputs to the codes; off where `ramp_steps` is 0.

    The input is what is snapped: with ``input_norm="layer_norm"`` strength 0 gives the normalised activation, not the activation itself,
    so that the first step is not the base's.
    """

    name, attribute, at_rest = "strength", "strength", 1.0

    @property
    def on(self) -> bool:
        """Tell whether there is a ramp."""
        return self.config.ramp_steps > 0

    def at(self, step: int) -> list[float]:
        """Return the strength of every codebook at a step, counted from 0."""
        return [strength_at_step(step, self.config.ramp_steps)] * len(self.books)


def schedules(model: Any, config: CodebookTrainingConfig) -> list[Schedule]:
    """Return every schedule there is, for the codebooks that the host has now."""
    return [KSchedule(model, config), RampSchedule(model, config)]
