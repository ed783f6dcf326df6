"""Threads that each compute alone, for tasks that are many and alike.

Torch's own parallelism splits every operation over all cores. A snap is dozens of short operations on a chunk of rows: splitting each of
them costs more than it brings, and collapses when the cores are shared (measured: 2x slower than the original library at load 5).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

__all__ = ["run", "scratch", "whose"]

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
_own = threading.local()
_HUGE_PAGE = 2 * 2**20
_HUGE_FROM = 4 * 2**20  # bytes; numpy's threshold


def _forget_pools() -> None:
    global _lock
    _pools.clear()  # threads do not survive a fork
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def _pool(n: int) -> ThreadPoolExecutor:
    with _lock:
        if n not in _pools:
            threads = torch.get_num_threads()
            started = threading.Barrier(n)

            def alone(_: int) -> None:
                torch.set_num_threads(1)  # of this thread; but also the default of threads that start later, hence the restoring
                torch.get_num_threads()  # makes torch take the 1 now: at this thread's first computation it would take the default
                _own.worker = True
                started.wait()

            pool = ThreadPoolExecutor(n, thread_name_prefix="tl_codebook.snap")
            list(pool.map(alone, range(n)))
            torch.set_num_threads(threads)
            _pools[n] = pool
        return _pools[n]


def run(work: Callable[[Any], None], tasks: Iterable[Any], n_workers: int) -> None:
    """Do every task once, on up to `n_workers` threads that use one core each; the first error is raised.

    Gradients are off in the workers; inference mode is the caller's.
    """
    tasks = list(tasks)
    n_workers = min(n_workers, len(tasks), torch.get_num_threads())
    if n_workers <= 1 or getattr(_own, "worker", False):  # a worker that waited for workers could wait for ever
        for task in tasks:
            work(task)
        return
    inference = torch.is_inference_mode_enabled()

    def in_caller_mode(task: Any) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(task)

    list(_pool(n_workers).map(in_caller_mode, tasks))


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return memory of this thread to write to, which the next call with the same name writes to again.

    Fresh memory costs a page fault every 4 KiB: for small d_group as much as the matrix product itself.
    """
    buffers = _own.__dict__.setdefault("buffers", {})
    n = math.prod(shape)
    old = buffers.get(name)
    if old is None or old.dtype != dtype or old.numel() < n:
        _own.__dict__.setdefault("owners", {}).pop(name, None)
        buffers.pop(name, None)  # not old and new at once
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written to outside it
            buffers[name] = old = _memory(n, dtype)
    return old[:n].view(shape)


def _memory(n: int, dtype: torch.dtype) -> torch.Tensor:
    size = n * dtype.itemsize
    if size < _HUGE_FROM:
        return torch.empty(n, dtype=dtype)
    # numpy asks the system for huge pages, which torch does not: far-apart reads of a table of scores then find their pages at hand.
    whole = np.empty(size + _HUGE_PAGE, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return torch.from_numpy(whole[start : start + size]).view(dtype)


def whose(name: str, owner: tuple[int, ...]) -> bool:
    """Say whether `scratch` of this name still holds what was written for `owner`, who has it from now on."""
    owners = _own.__dict__.setdefault("owners", {})
    before = owners.get(name)
    owners[name] = owner
    return bool(before == owner)
