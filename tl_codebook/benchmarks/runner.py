"""Run a case: build the peers, check what they answer, time them side by side, take their memory; one row a peer."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_codebook.benchmarks.agreement import gradient_error, wrong_rows
from tl_codebook.benchmarks.cases import Case
from tl_codebook.benchmarks.measure import cuda_peak, interleave, n_rotated
from tl_codebook.benchmarks.memory import peak_bytes
from tl_codebook.benchmarks.peers import PEERS
from tl_codebook.errors import ConfigError

__all__ = ["Settings", "run_case", "threads_set"]


@dataclass(frozen=True)
class Settings:
    """How to measure: where, in how many rounds, and whether memory is taken too (slower: one process a peer on a CPU)."""

    device: torch.device
    threads: int = 1
    reps: int = 7
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("threads", "reps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} was asked for. Give a number >= 1.")

    @property
    def clock(self) -> str:
        """Return the clock whose figures are the seconds of a row."""
        if self.device.type == "cuda":
            return "cuda"
        return "cpu" if self.threads == 1 else "wall"


@contextlib.contextmanager
def threads_set(n: int) -> Iterator[None]:
    """Set the number of threads of torch, and put it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_case(case: Case, peers: list[str], settings: Settings, tell: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Return a row for each peer; one that cannot run gives a row that says why. The GEMM alone always runs, for the ratios.

    >>> from tl_codebook.benchmarks import Shape
    >>> rows = run_case(Case(Shape(2, 4, 16, 2), rows=8), ["ours"], Settings(torch.device("cpu"), reps=1, memory=False))
    >>> [row["peer"] for row in rows], rows[0]["wrong_rows"]
    (['ours', 'gemm'], 0.0)
    """
    with threads_set(settings.threads):
        return _run_case(case, [*peers, *([] if "gemm" in peers else ["gemm"])], settings, tell)


def _run_case(case: Case, peers: list[str], settings: Settings, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    inputs, codes = case.tensors(settings.device)
    inputs = case.tensors(settings.device, n_rotated(inputs[0]))[0] if settings.device.type == "cuda" else inputs
    upstream = case.upstream(settings.device) if case.op == "backward" else None
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[Tensor], object]] = {}
    peaks: dict[str, int | None] = {}
    for name in peers:
        row = rows[name] = {"peer": name, **case.fields(), "reduce": case.reduce, "skipped": None, "note": None}
        row["skipped"] = PEERS[name].obstacle(case, settings.device)
        if case.op == "backward" and not PEERS[name].has_backward and name != "gemm":
            row["skipped"] = row["skipped"] or "it has no gradient"
        if row["skipped"]:
            continue
        tell(f"{case.name}: {name}, first call")
        try:
            calls[name], peaks[name] = _prepare(name, case, inputs[0], codes, upstream, row, settings)
        except Exception as error:  # whatever a compiler or a library does: the other peers go on
            if name in ("ours", "gemm"):
                raise
            row["skipped"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    if settings.memory and settings.device.type == "cpu":
        for name in calls:
            tell(f"{case.name}: {name}, memory")
            peaks[name] = peak_bytes(name, case, settings.threads)
    tell(f"{case.name}: {settings.reps} rounds of {', '.join(calls)}")
    times = interleave(calls, inputs, settings.reps)
    floor = times["gemm"].median(settings.clock)
    for name, row in rows.items():
        took = times.get(name)
        seconds = None if took is None else took.median(settings.clock)
        row |= {
            "clock": settings.clock,
            "seconds": seconds,
            "ratio_to_gemm": None if seconds is None else seconds / floor,
            "wall_seconds": None if took is None else took.median("wall"),
            "cpu_seconds": None if took is None or took.cpu is None else took.median("cpu"),
            "rounds": [] if took is None else (took.cpu if settings.clock == "cpu" and took.cpu is not None else took.wall),
            "peak_bytes": peaks.get(name),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        }
    calls.clear()
    gc.collect()
    return list(rows.values())


def _prepare(
    name: str, case: Case, x: Tensor, codes: Tensor, upstream: Tensor | None, row: dict[str, Any], settings: Settings
) -> tuple[Callable[[Tensor], object], int | None]:
    """Build a peer, call it once, check the answer; return what to time and, on a GPU, its extra memory."""
    codes = codes.detach().requires_grad_(upstream is not None)
    built = PEERS[name].build(case, codes.detach() if name == "gemm" else codes)
    row["note"] = built.note
    snap = built.snap
    peak = None

    def without_graph(x: Tensor) -> object:
        with torch.no_grad():
            return snap(x)

    if upstream is None or name == "gemm":
        with torch.no_grad():
            out, ids = snap(x)
        if ids is not None:
            row["wrong_rows"], row["checked_rows"] = wrong_rows(case, x, codes.detach(), ids)
        del out, ids
        if settings.memory and settings.device.type == "cuda":
            peak = cuda_peak(lambda: without_graph(x))
        return without_graph, peak
    out, ids = snap(x)
    if out is None or ids is None:
        raise TypeError("it returned no output to differentiate")
    gradient = torch.autograd.grad(out, codes, upstream, retain_graph=True)[0]
    row["wrong_rows"], row["checked_rows"] = wrong_rows(case, x, codes.detach(), ids)
    row["gradient_error"] = gradient_error(case, gradient, upstream, ids)
    del gradient
    if settings.memory and settings.device.type == "cuda":
        peak = cuda_peak(lambda: torch.autograd.grad(_output(snap(x)), codes, upstream))
    return lambda _: torch.autograd.grad(out, codes, upstream, retain_graph=True), peak


def _output(result: tuple[Tensor | None, Tensor | None]) -> Tensor:
    if result[0] is None:
        raise TypeError("it returned no output to differentiate")
    return result[0]
