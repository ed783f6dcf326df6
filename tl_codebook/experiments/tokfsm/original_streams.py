"""Rollouts drawn number for number as the original library draws them, to repeat its data exactly.

Both draw as ``numpy.random.Generator.choice`` does: one uniform number a step, looked up in the cumulative row of the transition matrix.

Source: codebook-features 0.1.2, ``FSM.generate_trajectory`` and ``FSM.generate_trajectories``.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook.errors import ConfigError
from tl_codebook.experiments.tokfsm.machine import TokFSM

__all__ = ["original_continuations", "original_trajectories"]


def _cumulative(machine: TokFSM) -> np.ndarray:
    """Return the table [state next] in which ``Generator.choice(p=...)`` looks a uniform number up, rounding included."""
    sums = np.cumsum(machine.transition.numpy(), axis=1)
    return np.asarray(sums / sums[:, -1:])


def _follow(cumulative: np.ndarray, state: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return np.asarray((cumulative[state] <= uniform[:, None]).sum(1))  # searchsorted, side="right"


def original_trajectories(machine: TokFSM, n_sequences: int, n_states: int, rng: np.random.Generator) -> Int[Tensor, "sequence state"]:
    """Sample rollouts from random starts with the original's stream: each rollout draws its start, then its steps, before the next.

    Args:
        machine: The machine.
        n_sequences: Rollouts, >= 1.
        n_states: States of each, >= 1.
        rng: Of numpy; the original goes on with the generator that made the machine (see `TokFSM.random`).

    Raises:
        ConfigError: fewer than one rollout or state.

    Source: codebook-features 0.1.2, ``FSM.generate_trajectory``.

    >>> import numpy as np
    >>> original_trajectories(TokFSM.paper(), 1, 6, np.random.default_rng(7)).tolist()
    [[94, 70, 76, 5, 22, 85]]
    """
    if n_sequences < 1 or n_states < 1:
        raise ConfigError(
            f"{n_sequences} rollouts of {n_states} states were asked for, but nothing would be sampled. Give 1 or more of both."
        )
    start, uniform = np.empty(n_sequences, dtype=np.int64), np.empty((n_sequences, n_states - 1))
    for sequence in range(n_sequences):
        start[sequence] = rng.choice(machine.n_states)
        uniform[sequence] = rng.random(n_states - 1)
    cumulative, rollouts = _cumulative(machine), [start]
    for step in range(n_states - 1):
        rollouts.append(_follow(cumulative, rollouts[-1], uniform[:, step]))
    return torch.from_numpy(np.stack(rollouts, axis=1))


def original_continuations(
    machine: TokFSM, start: Int[Tensor, " sequence"], n_states: int, rng: np.random.Generator
) -> Int[Tensor, "sequence state"]:
    """Sample what follows given states with the original's stream: all sequences draw one step, then the next.

    Args:
        machine: The machine.
        start: The state before the first that is returned, one for each sequence.
        n_states: States to return, >= 1.
        rng: Of numpy.

    Raises:
        ConfigError: fewer than one state.
        DataError: a start that is not a state.

    Source: codebook-features 0.1.2, ``FSM.generate_trajectories``; of one sequence from state 0: ``FSM.step``.

    >>> import numpy as np
    >>> original_continuations(TokFSM.paper(), torch.tensor([0]), 4, np.random.default_rng(8)).tolist()
    [[41, 94, 27, 74]]
    """
    if n_states < 1:
        raise ConfigError(f"{n_states} states were asked for, but nothing would be sampled. Give 1 or more.")
    machine.check_states(start)
    cumulative, state, rollouts = _cumulative(machine), start.cpu().numpy(), []
    for _ in range(n_states):
        state = _follow(cumulative, state, rng.random(len(state)))
        rollouts.append(state)
    return torch.from_numpy(np.stack(rollouts, axis=1))
