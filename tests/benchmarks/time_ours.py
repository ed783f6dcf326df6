"""Our codebooks for the peer timing: the same tensors, cases and line protocol as the original library's ``time_reference.py``.

    python -m tests.benchmarks.time_ours --inputs peer_inputs --serve

A driver that speaks the protocol times both in alternation (`tests.benchmarks.original` runs it): "ready", then for each line "<case>" one
repetition and one line of JSON {"case", "seconds"}; "ids <case> <path.npz>" saves ids and outputs; "quit" ends.

Like for like: LayerNorm per group, inner product with normalised codes, mean of the k nearest. `fwdbwd` is the original's loss ``aeloss``:
the gradient from above, plus that of the mean over rows of the squared distance between codes and input. The original counts nothing
while its logging is off (its default), so neither do we. We look for NaN in the input, which the original does not.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import numpy as np
import torch

from tl_codebook import Codebook, CodebookConfig

CASES = {"a": CodebookConfig.paper(10_000, k=8, n_groups=12), "b": CodebookConfig.paper(10_000, k=100, n_groups=1)}


def build(inputs):
    """Return {case: zero-argument callable} and {case: ids function} for the tensors in a folder."""

    def load(name):
        return torch.from_numpy(np.load(Path(inputs) / f"{name}.npy"))

    books, x, upstream = {}, {}, {}
    for name, config in CASES.items():
        x[name], upstream[name] = load(f"{name}_x"), load(f"{name}_upstream")
        book = books[name] = Codebook(x[name].shape[-1], config)
        book.count_when = "never"
        with torch.no_grad():
            for parameter, stem in ((book.codes, "codebook"), (book.norm_weight, "ln_w"), (book.norm_bias, "ln_b")):
                parameter.copy_(load(f"{name}_{stem}").view_as(parameter))

    def forward(name):
        def run():
            books[name].eval()
            with torch.no_grad():
                return books[name](x[name])

        return run

    def forward_backward(name):
        def run():
            book = books[name].train()
            book.zero_grad()
            leaf = x[name].clone().requires_grad_()
            out = book(leaf)
            torch.autograd.backward([out, book.terms.reconstruction], [upstream[name], None])
            return out

        return run

    def ids(name):
        def run():
            with torch.no_grad():
                chosen = books[name].encode(x[name])  # [batch pos group k]
            return {"out": forward(name)().numpy(), "ids": chosen.movedim(2, 0).numpy()}  # [group batch pos k]

        return run

    cases = {f"{name}_fwd": forward(name) for name in CASES} | {f"{name}_fwdbwd": forward_backward(name) for name in CASES}
    return cases, {name: ids(name) for name in CASES}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", default="peer_inputs")
    parser.add_argument("--out", default=None)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="a_fwd,b_fwd,a_fwdbwd,b_fwdbwd")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--save-ids", default=None)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cases, ids = build(asked.inputs)

    def once(case):
        started = time.perf_counter()
        cases[case]()
        return time.perf_counter() - started

    if asked.serve:
        print("ready", flush=True)
        for line in sys.stdin:
            words = line.split()
            if not words or words[0] == "quit":
                break
            if words[0] == "ids":
                np.savez(words[2], **ids[words[1]]())
                print(json.dumps({"saved": words[2]}), flush=True)
            else:
                print(json.dumps({"case": words[0], "seconds": once(words[0])}), flush=True)
        return
    result = {"library": "tl_codebook", "torch": torch.__version__, "threads": asked.threads, "N": 1024, "cases": {}}
    for case in asked.cases.split(","):
        for _ in range(asked.warmup):
            once(case)
        seconds = [once(case) for _ in range(asked.reps)]
        result["cases"][case] = {"seconds": seconds, "min": min(seconds), "median": float(np.median(seconds))}
        print(case, result["cases"][case], file=sys.stderr, flush=True)
    for name in ids if asked.save_ids else ():
        np.savez(f"{asked.save_ids}_{name}.npz", **ids[name]())
    text = json.dumps(result, indent=1)
    if asked.out:
        Path(asked.out).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
