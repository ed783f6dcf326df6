"""Clocks and memory.

Rounds are interleaved: every peer once a round, the order reversed in every other one.
CPU: wall time and CPU time of the process are taken together. With one thread the CPU time is the figure to believe (a neighbour cannot
add to it), with several the wall time is.
GPU: CUDA events around a series of calls whose inputs rotate through more bytes than the L2 cache holds.
Extra memory at the peak: on a GPU what the allocator counted above the start of the call, on a CPU see `tl_codebook.benchmarks.memory`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Times", "cuda_peak", "interleave", "n_rotated"]

_AT_LEAST = 0.02
"""Seconds of one measurement; shorter calls are repeated within it."""
_ROTATED_BYTES = 2**28
"""Bytes of rotating inputs: several times the L2 cache of today's GPUs."""


@dataclass
class Times:
    """The rounds of one peer: seconds a call, by the wall and by the process (None on a GPU, whose own clock counts)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] | None = field(default_factory=list)

    def median(self, clock: str) -> float:
        """Return the median of the clock ``cpu``, ``wall`` or ``cuda``."""
        return statistics.median(self.cpu if clock == "cpu" and self.cpu is not None else self.wall)


def n_rotated(x: Tensor) -> int:
    """Return how many inputs to rotate through, 1 on a CPU."""
    return min(16, max(2, math.ceil(_ROTATED_BYTES / max(1, x.nbytes)))) if x.is_cuda else 1


def interleave(calls: Mapping[str, Callable[[Tensor], object]], inputs: Sequence[Tensor], reps: int) -> dict[str, Times]:
    """Time each call in `reps` rounds, after one that is not counted."""
    one_round = _round_cuda if inputs[0].is_cuda else _round_cpu
    times = {name: Times(cpu=None if inputs[0].is_cuda else []) for name in calls}
    repeats = {}
    for name, call in calls.items():
        first = Times()
        one_round(call, inputs, 1, first)
        repeats[name] = max(1, min(1000, math.ceil(_AT_LEAST / max(first.wall[0], 1e-7))))
    for i in range(reps):
        for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            one_round(calls[name], inputs, repeats[name], times[name])
    return times


def _round_cpu(call: Callable[[Tensor], object], inputs: Sequence[Tensor], n: int, times: Times) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(n):
        call(inputs[i % len(inputs)])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    times.wall.append(wall / n)
    if times.cpu is not None:
        times.cpu.append(cpu / n)


def _round_cuda(call: Callable[[Tensor], object], inputs: Sequence[Tensor], n: int, times: Times) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for i in range(n):
        call(inputs[i % len(inputs)])
    end.record()
    torch.cuda.synchronize()
    times.wall.append(start.elapsed_time(end) / 1000 / n)


def cuda_peak(call: Callable[[], object]) -> int:
    """Return the bytes that a call took above what was allocated before it, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
