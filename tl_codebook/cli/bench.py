"""``tl-codebook bench``: what a snap costs on this machine, beside the definition, torch eager and compiled, faiss, and a GEMM alone."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_codebook.errors import ConfigError, nearest
from tl_codebook.files import check_writable, replace_json

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, measure case by case, print the table; with ``--json``, write the rows after each case."""
    asked = _parser().parse_args(list(argv))
    settings, cases, peers, tokens = _checked(asked)

    import torch

    from tl_codebook.benchmarks import model_table, run_case, snap_table, where

    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
    results: dict[str, Any] = {"where": where(settings.device, settings.threads), "command": _command(asked), "rows": [], "models": []}

    def keep() -> None:
        if asked.json is not None:
            replace_json(Path(asked.json), results)

    for i, case in enumerate(cases):
        results["rows"] += run_case(case, peers, settings, functools.partial(_tell, before=f"[{i + 1}/{len(cases)}] "))
        keep()
    for name in asked.models or []:
        from tl_codebook.benchmarks.whole_model import run_model

        default = (2, 128) if name == "gpt2-small" and settings.device.type == "cpu" else (4, 256)
        results["models"] += run_model(name, tokens or default, settings, asked.seed, _tell)
        keep()
    _tell("")
    if results["rows"]:
        print(snap_table(results["rows"]))
    if results["models"]:
        print(("\n" if results["rows"] else "") + model_table(results["models"]))
    about = results["where"]
    print(
        f"\n{about['device'] if settings.device.type == 'cuda' else about['cpu']}, threads: {about['threads']}, torch {about['torch']}, "
        f"commit {about['commit'] or 'unknown'}; median of {settings.reps} interleaved rounds by the {settings.clock} clock"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-codebook bench", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:1.")
    add("--shapes", nargs="+", metavar="GxDxCxK", help="Groups, width of a group, codes, k: 12x64x10000x8; by default a set of shapes.")
    add("--models", nargs="+", metavar="MODEL", help="Hugging Face folder or hub name of a model, or gpt2-small: measures these instead.")
    add("--tokens", metavar="BxP", help="Batch and positions of a model's input; 4x256 by default, 2x128 for gpt2-small on a CPU.")
    add("--rows", type=int, help="Vectors to snap; 2048 by default on a CPU (1024 for the largest shape), 16384 on a GPU.")
    add("--reps", type=int, default=7, help="Interleaved rounds; medians are reported.")
    add("--seed", type=int, default=0, help="Seed of the tensors.")
    add("--threads", type=int, default=1, help="Threads on the CPU; with 1 the CPU time counts, with more the wall time.")
    add(
        "--peers",
        nargs="+",
        metavar="PEER",
        help="Which to run: ours gemm definition paper eager eager_tf32 compile faiss; all by default.",
    )
    add("--selection", choices=("nearest", "residual"), help="How codes are chosen; nearest by default where --shapes are given.")
    add("--similarity", choices=("inner_product", "euclidean"), help="inner_product by default for nearest, euclidean for residual.")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="Of inputs and codes.")
    add("--backward", action="store_true", help="Measure the gradient of the codes instead of the forward pass.")
    add("--no-memory", action="store_true", help="Leave the peak memory out; on a CPU each peer needs a process of its own for it.")
    add("--json", metavar="FILE", help="Write the rows to a JSON file as well.")
    return parser


def _checked(asked: argparse.Namespace) -> tuple[Any, list[Any], list[str], tuple[int, int] | None]:
    """Turn the arguments into settings, cases, peers and the tokens of a model, or say what is wrong with them, before any work is done."""
    from tl_codebook.benchmarks import CASES_CPU, CASES_GPU, PEERS, Case, Settings, Shape

    settings = Settings(_device(asked.device), asked.threads, asked.reps, not asked.no_memory)
    peers = asked.peers or list(PEERS)
    for name in peers:
        if name not in PEERS:
            raise ConfigError(f"the peer {name!r} is not known. {nearest(name, PEERS)}Choose from {', '.join(PEERS)}.")
    how = {"dtype": asked.dtype, "op": "backward" if asked.backward else "forward", "seed": asked.seed}
    if asked.shapes:
        selection = asked.selection or "nearest"
        similarity = asked.similarity or ("euclidean" if selection == "residual" else "inner_product")
        rows = asked.rows if asked.rows is not None else 2048 if settings.device.type == "cpu" else 16384
        cases = [Case(Shape.parse(text), rows, selection, similarity, **how) for text in asked.shapes]
    else:
        cases = [dataclasses.replace(case, **how) for case in (CASES_CPU if settings.device.type == "cpu" else CASES_GPU)]
        if asked.rows is not None:
            cases = [dataclasses.replace(case, rows=asked.rows) for case in cases]
        if asked.selection:
            cases = [case for case in cases if case.selection == asked.selection]
        if asked.similarity:
            cases = [dataclasses.replace(case, similarity=asked.similarity) for case in cases]
        if asked.models:
            cases = []
    tokens = None
    if asked.tokens is not None:
        found = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", asked.tokens)
        if not found:
            raise ConfigError(f"--tokens {asked.tokens!r} cannot be read. Give batch and positions, such as 4x256.")
        tokens = (int(found[1]), int(found[2]))
    if asked.json is not None:
        target = Path(asked.json)
        if target.is_dir():
            raise ConfigError(f"--json {asked.json} is a folder. Give the name of a file.")
        check_writable(target.parent, overwrite=True)
    return settings, cases, peers, tokens


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"the device {name!r} is not known. Choose cpu, cuda or cuda:1.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"the device {name!r} cannot be measured. Choose cpu or cuda.")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise ConfigError(f"the device {name!r} was asked for, and this machine has {n_gpus} GPUs that torch can use. Choose cpu.")
    return device


def _command(asked: argparse.Namespace) -> str:
    """Return the command that would do the same elsewhere: no path of this machine in it."""
    words = ["tl-codebook bench"]
    for name, value in vars(asked).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False and name != "json":
            values = value if isinstance(value, list) else [value]
            words.append(f"{flag} {' '.join(Path(str(one)).name if name == 'models' else str(one) for one in values)}")
    return " ".join(words)


def _tell(line: str, before: str = "") -> None:
    """Show progress: one line that is written over on a terminal, plain lines elsewhere."""
    line = before + line
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{line}"[:200], end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
