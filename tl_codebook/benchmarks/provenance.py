"""Which machine, which versions, which commit: what a number needs beside it."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tl_codebook

__all__ = ["cpu_name", "where"]


def cpu_name() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = Path(tl_codebook.__file__).parent

    def git(*words: str) -> str:
        run = ["git", "-C", str(folder), *words]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        if not git("ls-files", "__init__.py"):
            return None  # installed somewhere inside another repository
        return commit + ("-changed" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def where(device: torch.device, threads: int) -> dict[str, Any]:
    """Return the provenance of a run as plain JSON values; an unknown commit or a package that is not there is None."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": _version("triton"),
        "faiss": _version("faiss-cpu") or _version("faiss-gpu") if importlib.util.find_spec("faiss") else None,
        "transformer_lens": _version("transformer-lens"),
        "tl_codebook": tl_codebook.__version__,
        "commit": _commit(),
    }
