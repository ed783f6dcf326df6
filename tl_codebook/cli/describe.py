"""``tl-codebook describe``: the page of one code, or labels for all codes of a store."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from tl_codebook.cli.loading import load_model
from tl_codebook.errors import ConfigError

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, and print what is known of a code, or the labels; with ``--json`` as one JSON object on standard output."""
    asked = _parser().parse_args(list(argv))
    if (asked.code is None) == (not asked.label_all):
        raise ConfigError("describe one thing: a CODE such as L3.mlp_out:417, or all codes with --label_all.")
    if asked.measure and asked.model is None:
        raise ConfigError("--measure runs the model that the codes were collected from. Give its folder: --model.")
    from tl_codebook.store import CodeStore

    store = CodeStore(asked.store)
    model = None if asked.model is None else load_model(asked.model)
    print(_labels(store, model, asked) if asked.label_all else _page(store, model, asked))
    return 0


def _page(store: Any, model: Any, asked: argparse.Namespace) -> str:
    from tl_codebook.describe import describe_code

    page = describe_code(store, asked.code, model, n=asked.n, n_contexts=asked.n_contexts, seed=asked.seed, measure=asked.measure)
    if asked.html is not None:
        from tl_codebook.views import show_examples

        show_examples(store, page.code, n=asked.n_contexts, order="random", seed=asked.seed, model=model).save(
            asked.html, overwrite=asked.overwrite
        )
    return json.dumps(page.as_dict(), indent=2, allow_nan=False) if asked.json else str(page)


def _labels(store: Any, model: Any, asked: argparse.Namespace) -> str:
    from tl_codebook.describe import label_codes, write_labels
    from tl_codebook.files import target_file

    if asked.labels is not None:
        target_file(asked.labels, asked.overwrite)  # refused before the work, not after it
    labels = label_codes(
        store, sites=asked.sites, min_precision=asked.min_precision, model=model, seed=asked.seed, progress=not asked.quiet
    )
    if asked.labels is not None:
        write_labels(labels, asked.labels, overwrite=asked.overwrite)
    if asked.json:
        counts = {"n_codes": labels.n_codes, "n_labelled": labels.n_labelled, "n_unlabelled": labels.n_unlabelled}
        return json.dumps(counts | {"labels": [dataclasses.asdict(label) for label in labels]}, indent=2, allow_nan=False)
    return str(labels) if asked.labels is not None else f"{labels}\nAll of them: --labels FILE, or --json."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-codebook describe", description=__doc__)
    add = parser.add_argument
    add("store", metavar="STORE", help="folder that tl-codebook collect wrote")
    add("code", metavar="CODE", nargs="?", help="label of a code, such as L3.mlp_out:417 or L5.z.2:88")
    add("--model", help="folder of the model that the codes were collected from: what the code does to the logits, and codes alike")
    add("--measure", action="store_true", help="run the model too: contexts by similarity, and what forcing the code changes")
    add("--n", type=int, default=10, help="rows of each table")
    add("--n_contexts", type=int, default=10, help="contexts of each kind")
    add("--seed", type=int, default=0, help="of all that is drawn")
    add("--html", help="write the examples to this file too, which a browser opens offline")
    add("--label_all", action="store_true", help="instead of one code: a label for every code that has one")
    add("--sites", nargs="+", help="with --label_all: sites, addresses or hook names; all by default")
    add("--min_precision", type=float, default=0.9, help="with --label_all: least precision on the held-out half, 0 to 1")
    add("--labels", help="with --label_all: write the labels to this file too")
    add("--overwrite", action="store_true", help="replace the files that --html and --labels name")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress bar")
    return parser
