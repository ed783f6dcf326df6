"""``tl-codebook collect``: run a codebook model over texts and write down which codes fire where."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tl_codebook.errors import ConfigError

if TYPE_CHECKING:
    from tl_codebook.store.store import CodeStore

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, collect, and print how the codes are used; with ``--json`` as one JSON object on standard output."""
    asked = _parser().parse_args(list(argv))
    from tl_codebook import collect_codes, load
    from tl_codebook.store.processes import Processes

    began = time.perf_counter()
    device = _device(asked.device)
    with contextlib.redirect_stdout(sys.stderr):  # TransformerLens prints there what it does
        model = load(asked.model, device=None if device == "cpu" else device)
        loaded = time.perf_counter()
        store = collect_codes(
            model,
            asked.dataset,
            asked.output,
            n_tokens=asked.n_tokens,
            sites=asked.sites,
            column=asked.column,
            context_length=asked.context_length,
            batch_size=asked.batch_size,
            resume=asked.resume,
            overwrite=asked.overwrite,
            progress=not asked.quiet,
        )
    seconds = time.perf_counter() - loaded
    if Processes.current(device.split(":")[0]).main:
        figures = _figures(store) | {"seconds": round(seconds, 3), "seconds_to_load": round(loaded - began, 3)}
        print(json.dumps(figures, indent=2, allow_nan=False) if asked.json else _table(figures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-codebook collect", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that tl_codebook.save (or tl-codebook train) wrote")
    add("dataset", metavar="TEXTS", help="hub name, folder, or .jsonl, .json, .csv, .parquet or .txt file with texts")
    add("output", metavar="OUT", help="folder of the store; tl_codebook.CodeStore opens it")
    add("--n_tokens", type=int, help="positions to collect, BOS among them; all by default")
    add("--sites", nargs="+", help="sites (z), addresses (L3.mlp_out) or hook names; all codebooks by default")
    add("--column", default="text", help="column of the texts")
    add("--context_length", type=int, help="most tokens of a sequence; the model's context, at most 512, by default")
    add("--batch_size", type=int, default=8, help="sequences of full length at a time")
    add("--device", help="cpu, cuda, cuda:1 ...; a GPU where there is one, by default")
    add("--resume", action="store_true", help="go on with an unfinished collection in OUT")
    add("--overwrite", action="store_true", help="replace the store in OUT")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _device(asked: str | None) -> str:
    import torch

    if asked is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):  # a model on meta has no numbers
        raise ConfigError(f"--device {asked!r} is no device. Give cpu, cuda, or one of several such as cuda:1.")
    n_devices = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if not n_devices:
        raise ConfigError(f"--device {asked} was asked for, and no GPU can be used. Leave it out, or give cpu.")
    if (device.index or 0) >= n_devices:
        raise ConfigError(f"--device {asked} was asked for, and there are {n_devices}, from {device.type}:0. Give one of them.")
    return asked


def _figures(store: CodeStore) -> dict[str, Any]:
    sites = {}
    for book in store.sites.values():
        dead, perplexity = store.dead(book.hook_name), store.perplexity(book.hook_name)
        sites[book.label] = {
            **book.described(),
            "dead": int(dead.sum()),
            "dead_share": round(float(dead.mean()), 6),
            "perplexity": round(float(perplexity.mean()), 3),
        }
    about = {"path": str(store.path), "n_tokens": store.n_tokens, "n_sequences": store.n_sequences, "bytes": store.nbytes}
    return about | {"sites": sites}


def _table(figures: dict[str, Any]) -> str:
    """Return the figures as lines for people."""
    lines = [f"{'site':<18} {'codes':>14} {'k':>3} {'dead':>7} {'perplexity':>11}"]
    for label, site in figures["sites"].items():
        codes = f"{site['n_groups']} x {site['n_codes']}" if site["n_groups"] > 1 else str(site["n_codes"])
        lines.append(f"{label:<18} {codes:>14} {site['k']:>3} {site['dead_share']:>7.1%} {site['perplexity']:>11.1f}")
    size = f"{figures['n_tokens']:,} tokens in {figures['n_sequences']:,} sequences, {figures['bytes'] / 1e6:,.1f} MB"
    return "\n".join([*lines, f"\n{size}, {figures['seconds']:.1f} s; open it with tl_codebook.CodeStore({figures['path']!r})"])
