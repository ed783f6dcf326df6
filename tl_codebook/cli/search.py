"""``tl-codebook search``: which codes of a store stand best for a regular expression, for tokens, or for one example."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from tl_codebook.cli.loading import load_model
from tl_codebook.errors import ConfigError, check_whole

if TYPE_CHECKING:
    from tl_codebook.store.neurons import CodeBesideNeuron
    from tl_codebook.store.search import CodeHit

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, search, and print the codes, best first; with ``--json`` as one JSON object on standard output."""
    asked = _parser().parse_args(list(argv))
    given = [asked.pattern is not None, asked.tokens is not None, asked.example is not None]
    if sum(given) != 1:
        raise ConfigError("search for one thing: a PATTERN, --tokens, or --example.")
    if asked.neurons and (asked.model is None or asked.example is not None):
        raise ConfigError("--neurons compares the codes of a pattern or of tokens with the neurons of a model. Give its folder: --model.")
    from tl_codebook.store import CodeHit, CodeStore, codes_of_example, compare_with_neurons, match_text, neuron_activations, search_codes
    from tl_codebook.store.tables import write_csv

    store = CodeStore(asked.store)
    check_whole("n", asked.n, least=1)
    common = {"sites": asked.sites, "n": None, "n_slots": asked.n_slots}
    where = {"at": asked.at, "shift": asked.shift, "special": asked.special}
    began = scanned = time.perf_counter()
    query: Any = asked.tokens
    if asked.example is not None:
        shares: dict[str, Any] = {} if asked.min_recall is None else {"min_share": asked.min_recall}
        hits = codes_of_example(store, asked.example, by=asked.by or "mi", **common, **shares)
    else:
        if asked.pattern is not None:
            query = match_text(store, asked.pattern, group=asked.group, timeout=asked.timeout)
            scanned = time.perf_counter()
        least = {"min_precision": asked.min_precision, "min_recall": 0.01 if asked.min_recall is None else asked.min_recall}
        hits = search_codes(store, query, by=asked.by or "f1", **common, **where, **least)
    n_found, hits = len(hits), hits[: asked.n]
    seconds = {"search": time.perf_counter() - scanned}
    if asked.pattern is not None:
        seconds["text"] = scanned - began
    beside: list[CodeBesideNeuron] = []
    if asked.neurons and hits:
        model = load_model(asked.model)
        store.check_model(model)
        beside = compare_with_neurons(store, query, neuron_activations(model, store), hits=hits[:8], progress=not asked.quiet, **where)
    if asked.csv is not None:
        write_csv(hits, asked.csv, of=CodeHit, overwrite=asked.overwrite)
    if asked.json:
        found: dict[str, Any] = {"pattern": asked.pattern, "tokens": asked.tokens, "example": asked.example}
        found |= {"n_found": n_found, "hits": [dataclasses.asdict(hit) for hit in hits]}
        found |= {"neurons": [dataclasses.asdict(row) for row in beside]} if asked.neurons else {}
        print(json.dumps(found | {"seconds": {name: round(value, 4) for name, value in seconds.items()}}, indent=2, allow_nan=False))
    else:
        print(_table(hits, n_found, beside, seconds))
    return 0


def _parser() -> argparse.ArgumentParser:
    from tl_codebook.store.concepts import At
    from tl_codebook.store.search import By

    parser = argparse.ArgumentParser(prog="tl-codebook search", description=__doc__)
    add = parser.add_argument
    add("store", metavar="STORE", help="folder that tl-codebook collect wrote")
    add("pattern", metavar="PATTERN", nargs="?", help="regular expression; the codes fire on its group: 'New (York)'")
    add("--tokens", nargs="+", metavar="TOKEN", type=_token, help="instead of a pattern: token ids, or texts that are one token each")
    add("--example", type=int, help="instead of a pattern: the codes that fire on much of this sequence")
    add("--sites", nargs="+", help="sites (z), addresses (L3.mlp_out, L5.z.2) or hook names; all by default")
    add(
        "--by",
        choices=get_args(By),
        help="what comes first: greatest f1 (the default), precision, recall, or mutual information (the default with --example)",
    )
    add("--min_precision", type=float, default=0.0, help="least share of a code's activations, 0 to 1")
    add("--min_recall", type=float, help="least share of the places, 0 to 1: 0.01 by default, 0.5 with --example")
    add("--at", choices=get_args(At), default="first", help="which tokens of a match are meant")
    add("--group", type=_group, help="group of the pattern, by number or name; the first by default, 0 for the whole match")
    add("--shift", type=int, default=0, help="the token so many places later; -1 for the codes that come just before")
    add("--n", type=int, default=20, help="codes to show")
    add("--n_slots", type=int, help="count the first slots only, those of the most similar codes")
    add("--special", action="store_true", help="count BOS and other special tokens as places too")
    add("--timeout", type=float, default=2.0, help="seconds of matching after which a pattern is given up")
    add("--neurons", action="store_true", help="show the best neuron at the same recall beside the first codes; needs --model")
    add("--model", help="folder of the model that the codes were collected from")
    add("--csv", help="write the codes to this file too")
    add("--overwrite", action="store_true", help="replace the file that --csv names")
    add("--json", action="store_true", help="print the codes as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _token(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() else text


_group = _token


def _table(hits: Sequence[CodeHit], n_found: int, beside: Sequence[CodeBesideNeuron], seconds: dict[str, float]) -> str:
    """Return the codes as lines for people."""
    if not hits:
        return "no code was found: nothing fires there often enough, or the concept holds nowhere. Lower --min_recall or --min_precision."
    width = max(len(hit.label) for hit in hits)
    lines = [f"{'code':<{width}} {'precision':>9} {'recall':>7} {'f1':>6} {'bits':>7} {'hits':>8} {'fires':>8}"]
    for hit in hits:
        figures = f"{hit.precision:>9.1%} {hit.recall:>7.1%} {hit.f1:>6.3f} {hit.mi:>7.4f} {hit.hits:>8,} {hit.activations:>8,}"
        lines.append(f"{hit.label:<{width}} {figures}")
    if beside:
        lines += ["", f"{'code':<{width}} {'precision':>9} {'recall':>7}   best neuron at that recall"]
        for row in beside:
            neuron = f"{row.neuron} {row.neuron_precision:.1%} at {row.neuron_recall:.1%}"
            lines.append(f"{row.label:<{width}} {row.precision:>9.1%} {row.recall:>7.1%}   {neuron}")
    took = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return "\n".join([*lines, f"\n{len(hits):,} of {n_found:,} codes; {hits[0].occurrences:,} places; {took}"])
