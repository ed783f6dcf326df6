"""The machine: states, their successors, and rollouts of them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.errors import ConfigError, DataError

__all__ = ["DIGITS", "TokFSM"]

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""How digits are written; base 36 is the largest that has a character for each."""


def check_range(name: str, value: int, low: int, high: int | None, reason: str) -> None:
    """Raise unless a number is `low` or more and, where there is a `high`, no more than that; `reason` is part of what is said.

    Raises:
        ConfigError: it is not.

    >>> check_range("batch_size", 1, 1, None, "a batch holds a row")
    """
    if value < low or (high is not None and value > high):
        raise ConfigError(f"{name}={value} was asked for, but {reason}. Give {low} {'or more' if high is None else f'to {high}'}.")


class TokFSM:
    """A finite state machine that goes from each state to one of its successors, all equally probable, and writes states as digits.

    A rollout begins in any state, with equal probability.

    Args:
        adjacency: Bool [state next]: whether `next` is a successor of `state`; at least one is true in every row.
        base: Base of the digits, 2 to 36; also the token id of BOS, so the vocabulary is ``base + 1`` tokens.
        n_digits: Digits of a state, >= 1; by default as few as the states fit in.

    Raises:
        ConfigError: the adjacency is not square or not Bool, a state has no successor, or the states do not fit the digits.

    Source: Tamkin et al. 2023, section 3 (TokFSM).

    >>> machine = TokFSM(torch.tensor([[False, True], [True, True]]), base=2)
    >>> machine
    TokFSM(n_states=2, n_edges=3, base=2, n_digits=1)
    >>> machine.successors(1).tolist()
    [0, 1]
    """

    def __init__(self, adjacency: Tensor, base: int = 10, n_digits: int | None = None):
        if adjacency.dtype != torch.bool or adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
            raise ConfigError(
                f"an adjacency of {adjacency.dtype} {list(adjacency.shape)} was given, but it says of each pair of states whether there is "
                f"an edge. Give bool [state next], as many columns as rows (probabilities > 0 is one)."
            )
        n_states = adjacency.shape[0]
        check_range("n_states", n_states, 1, None, "a machine is somewhere")
        check_range("base", base, 2, len(DIGITS), "a digit is one character, 0 to 9 or A to Z")
        needed = 1
        while base**needed < n_states:
            needed += 1
        if n_digits is not None and n_digits < needed:
            raise ConfigError(
                f"n_digits={n_digits} was asked for, but {n_states} states need {needed} digits in base {base}. "
                f"Give n_digits={needed} or more, a larger base or fewer states."
            )
        if n_digits is not None and base**n_digits > 2**31:
            raise ConfigError(f"n_digits={n_digits} was asked for, but numbers of states end at 2**31. Give {needed}, which is enough.")
        stuck = (~adjacency.any(1)).nonzero().flatten().tolist()
        if stuck:
            raise ConfigError(f"states {stuck[:5]} have no successor, so a rollout could not go on. Give every state an edge.")
        self.adjacency: Bool[Tensor, "state next"] = adjacency.detach().cpu().clone()
        self.base = base
        self.n_digits = needed if n_digits is None else n_digits

    @classmethod
    def random(cls, n_states: int, n_edges: int, seed: int | np.random.Generator, *, base: int = 10, n_digits: int | None = None) -> TokFSM:
        """Build a machine whose states each have `n_edges` different random successors.

        The successors of state after state are ``rng.choice(n_states, n_edges, replace=False)``, the stream of the original library.

        Args:
            n_states: States, 1 to ``base ** n_digits``.
            n_edges: Successors of each state, 1 to `n_states`.
            seed: Of ``numpy.random.default_rng``, or such a generator, which is drawn from.
            base, n_digits: As in `TokFSM`.

        Raises:
            ConfigError: more edges than states, fewer than one of either, or states that do not fit the digits.

        Source: Tamkin et al. 2023, section 3; codebook-features 0.1.2, ``FSM``.

        >>> TokFSM.random(4, 1, seed=42, base=2).adjacency.nonzero().tolist()
        [[0, 0], [1, 3], [2, 2], [3, 1]]
        """
        check_range("n_states", n_states, 1, None, "a machine is somewhere")
        check_range("n_edges", n_edges, 1, n_states, f"the successors of a state are different states, of {n_states}")
        rng = np.random.default_rng(seed)
        adjacency = np.zeros((n_states, n_states), dtype=bool)
        for row in adjacency:
            row[rng.choice(n_states, size=n_edges, replace=False)] = True
        return cls(torch.from_numpy(adjacency), base, n_digits)

    @classmethod
    def paper(cls) -> TokFSM:
        """Build the machine of the paper: 100 states of two decimal digits, 10 successors each, seed 42.

        Source: Tamkin et al. 2023, section 3; codebook-features 0.1.2.

        >>> TokFSM.paper()
        TokFSM(n_states=100, n_edges=1000, base=10, n_digits=2)
        """
        return cls.random(100, 10, seed=42)

    def __repr__(self) -> str:
        return f"TokFSM(n_states={self.n_states}, n_edges={self.n_edges}, base={self.base}, n_digits={self.n_digits})"

    @property
    def n_states(self) -> int:
        """Number of states."""
        return self.adjacency.shape[0]

    @property
    def n_edges(self) -> int:
        """Number of edges of the whole machine."""
        return int(self.adjacency.sum())

    @property
    def bos(self) -> int:
        """Token id of BOS; those of the digits are below it."""
        return self.base

    @property
    def n_vocabulary(self) -> int:
        """Number of tokens: the digits and BOS."""
        return self.base + 1

    @cached_property
    def n_successors(self) -> Int[Tensor, " state"]:
        """Number of successors of each state."""
        return self.adjacency.sum(1)

    @cached_property
    def transition(self) -> Float[Tensor, "state next"]:
        """Probability of the next state given the state, float64, each row summing to 1."""
        return self.adjacency.double() / self.n_successors[:, None].double()

    @cached_property
    def _successor_table(self) -> Int[Tensor, "state edge"]:
        """Successors of each state in ascending order; what fills short rows is never read."""
        return torch.argsort(self.adjacency, dim=1, descending=True, stable=True)[:, : int(self.n_successors.max())].contiguous()

    def successors(self, state: int) -> Int[Tensor, " edge"]:
        """Return the states that can follow a state (0 to n_states - 1), ascending.

        Raises:
            DataError: there is no such state.

        >>> TokFSM.paper().successors(0).tolist()
        [8, 9, 19, 41, 60, 68, 71, 82, 94, 96]
        """
        self.check_states(torch.tensor([state]))
        return self.adjacency[state].nonzero().flatten()

    def predecessors(self, state: int) -> Int[Tensor, " edge"]:
        """Return the states that a state (0 to n_states - 1) can follow, ascending.

        Raises:
            DataError: there is no such state.

        >>> TokFSM.paper().predecessors(1).tolist()
        [12, 25, 42, 44, 56, 85, 88]
        """
        self.check_states(torch.tensor([state]))
        return self.adjacency[:, state].nonzero().flatten()

    def reversed(self) -> TokFSM:
        """Return the machine with every edge turned round; the numbers of successors then differ from state to state.

        Raises:
            ConfigError: a state has no predecessor, so that the reverse could not go on from it.

        Source: codebook-features 0.1.2, ``FSM.reverse``.

        >>> TokFSM.paper().reversed().successors(1).tolist()
        [12, 25, 42, 44, 56, 85, 88]
        """
        return TokFSM(self.adjacency.T, self.base, self.n_digits)

    def check_states(self, states: Int[Tensor, "*lead"]) -> None:
        """Raise unless each number is a state, 0 to n_states - 1.

        Raises:
            DataError: one is not.

        >>> TokFSM.paper().check_states(torch.tensor([0, 99]))
        """
        wrong = states[(states < 0) | (states >= self.n_states)]
        if wrong.numel():
            raise DataError(f"state {int(wrong[0])} was given, but the machine has {self.n_states} states. Give 0 to {self.n_states - 1}.")

    def states_in_row(self, n_tokens: int) -> int:
        """Return how many states a row of `n_tokens` tokens is cut from: BOS takes the place of the last digit.

        Raises:
            ConfigError: fewer than two tokens, in which nothing predicts anything, or no multiple of the digits of a state.

        Source: Tamkin et al. 2023, section 3 (rollouts of 64 states are 128 tokens).

        >>> TokFSM.paper().states_in_row(128)
        64
        """
        least = max(2, self.n_digits)
        if n_tokens < least or n_tokens % self.n_digits:
            raise ConfigError(
                f"rows of {n_tokens} tokens were asked for, but a state is {self.n_digits} tokens and a row holds two tokens or more. "
                f"Give a multiple of {self.n_digits}, {-(-least // self.n_digits) * self.n_digits} or more."
            )
        return n_tokens // self.n_digits

    def sample(
        self,
        n_sequences: int,
        n_states: int,
        generator: torch.Generator | np.random.Generator | None = None,
        *,
        start: Int[Tensor, " sequence"] | None = None,
    ) -> Int[Tensor, "sequence state"]:
        """Sample rollouts, all of them a step at a time, so that many short ones cost less than few long ones.

        The distribution is the original library's, the random stream is not: that one is drawn number by number (`original_trajectories`).

        Args:
            n_sequences: Rollouts, >= 1.
            n_states: States of each, >= 1.
            generator: Of torch (on the CPU) or numpy; by default torch's global one.
            start: The first state of each rollout; by default any, with equal probability.

        Raises:
            ConfigError: fewer than one rollout or state, or another number of starts than of rollouts.
            DataError: a start that is not a state.

        Source: Tamkin et al. 2023, section 3.

        >>> machine = TokFSM.random(4, 1, seed=42, base=2)
        >>> machine.sample(2, 5, torch.Generator().manual_seed(0), start=torch.tensor([1, 2])).tolist()
        [[1, 3, 1, 3, 1], [2, 2, 2, 2, 2]]
        """
        check_range("n_sequences", n_sequences, 1, None, "nothing would be sampled")
        check_range("n_states", n_states, 1, None, "nothing would be sampled")
        if start is None:
            state = (_uniform(n_sequences, generator) * self.n_states).long()
        elif start.shape != (n_sequences,):
            raise ConfigError(f"start has the shape {list(start.shape)}, but there are {n_sequences} rollouts. Give one state for each.")
        else:
            self.check_states(start)
            state = start.cpu().long()
        table, width = self._successor_table.flatten(), self._successor_table.shape[1]
        degrees = self.n_successors.double()
        rollouts = torch.empty(n_states, n_sequences, dtype=torch.long)
        rollouts[0] = state
        for step in range(1, n_states):
            choice = (_uniform(n_sequences, generator) * degrees[state]).long()  # below the degree: a double < 1 times n rounds below n
            state = table[state * width + choice]
            rollouts[step] = state
        return rollouts.T.contiguous()


def _uniform(n: int, generator: torch.Generator | np.random.Generator | None) -> Float[Tensor, " n"]:
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.random(n))
    return torch.rand(n, generator=generator, dtype=torch.float64)
