"""Extra memory at the peak of one call on a CPU, taken in a process of its own (``python -m tl_codebook.benchmarks.memory``).

Linux keeps the largest resident size of a process (VmHWM) and forgets it on request (5 written to /proc/self/clear_refs). So: make the
tensors; call once on a tiny case, and multiply matrices, so that libraries are loaded and have their own buffers; forget; call; the largest
size less the size before. What the peer keeps for its next call counts, and so does its result. A compiled peer is called once on the case
itself before, so that its compiler is not counted. The allocator is told to give freed blocks back at once: memory that it had kept would
be used again unseen.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tl_codebook.benchmarks.cases import Case, Shape
from tl_codebook.benchmarks.peers import PEERS

__all__ = ["peak_bytes", "resident_bytes"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TIME_LIMIT = 900


def peak_bytes(peer: str, case: Case, threads: int) -> int | None:
    """Return the extra bytes at the peak of one call (with its backward pass, where the case has one); None where it cannot be taken."""
    if not _STATUS.exists() or not os.access(_CLEAR, os.W_OK):
        return None
    asked = json.dumps({"peer": peer, "threads": threads, "case": case.fields()})
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = [sys.executable, "-m", "tl_codebook.benchmarks.memory", asked]
    try:
        done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=_TIME_LIMIT, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError):
        return None
    return int(found) if isinstance(found, int) else None


def resident_bytes(field: str) -> int:
    """Return the resident size of this process: now (``VmRSS``), or the largest so far (``VmHWM``), mapped files included; Linux alone."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), flags=re.M)
    if not found:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


def _measure(peer: str, case: Case) -> int:
    tiny = dataclasses.replace(case, shape=Shape(1, 8, case.shape.k + 8, case.shape.k), rows=4)
    _call(peer, tiny)()
    torch.mm(torch.ones(1024, 512), torch.ones(512, 1024))
    call = _call(peer, case)
    if peer == "compile":
        call()
    _CLEAR.write_text("5")
    before = resident_bytes("VmRSS")
    result = call()
    peak = resident_bytes("VmHWM") - before
    del result
    return max(0, peak)


def _call(peer: str, case: Case) -> Callable[[], object]:
    (x,), codes = case.tensors("cpu")
    backward = case.op == "backward"
    codes.requires_grad_(backward and peer != "gemm")
    upstream = case.upstream("cpu") if backward else None
    snap = PEERS[peer].build(case, codes).snap

    def call() -> object:
        with torch.set_grad_enabled(backward):
            result = snap(x)
        if upstream is None or result[0] is None:
            return result
        return torch.autograd.grad(result[0], codes, upstream)

    return call


def _main(asked: dict[str, Any]) -> None:
    torch.set_num_threads(asked["threads"])
    found = _measure(asked["peer"], Case.from_fields(asked["case"]))
    sys.stdout.write(json.dumps({"peak_bytes": found}) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
