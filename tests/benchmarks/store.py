"""What reading codes costs at a million tokens: collecting them beside the forward pass alone, queries, code pages, and memory.

    python -m tests.benchmarks.store             # runs, about half an hour on one core, and writes results/store.json
    python -m tests.benchmarks.store --table     # prints the README's table from it

The stories model with codes from k-means at z (8 heads x 256) and mlp_out (1,024), k=8, in all five layers; stories, Shakespeare and
speeches. Collecting and reading are processes of their own, so that the peak of memory is theirs alone. Needs the shared model and texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import tl_codebook as tlc
from tl_codebook.benchmarks import where
from tl_codebook.benchmarks.memory import resident_bytes
from tl_codebook.files import replace_json

RESULTS = Path(__file__).with_name("results") / "store.json"
SHARED = Path(__file__).resolve().parents[3] / "shared"
LENGTH, BATCH = 256, 8
QUERIES = {
    "a name": r"\b(Lily)\b",
    "a word after another": r"\bthe (\w+)",
    "punctuation": r"([,.!?;:])",
    "a capital letter": r"\b([A-Z]\w*)",
    "every word": r"(\w+)",
}


def texts() -> Iterator[str]:
    """Give the stories, Shakespeare's lines and the speeches, document by document."""
    for line in (SHARED / "data/stories-train.jsonl").read_text().splitlines():
        yield json.loads(line)["text"]
    shakespeare = (SHARED / "data/tinyshakespeare.txt").read_text()
    yield from (shakespeare[i : i + 4000] for i in range(0, len(shakespeare), 4000))
    for name in ("inaugural.zip", "state_union.zip"):
        with zipfile.ZipFile(SHARED / "data" / name) as archive:
            for entry in sorted(archive.namelist()):
                if entry.endswith(".txt") and not entry.endswith("README.txt"):
                    yield archive.read(entry).decode("latin-1")


def make_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = tlc.load_hf(str(SHARED / "models/stories260K"))
    tlc.attach(model, {"z": tlc.CodebookConfig(n_codes=256, k=8), "mlp_out": tlc.CodebookConfig(n_codes=1024, k=8)})
    some = [model.to_tokens(text)[0, :LENGTH] for text in list(texts())[:200]]
    tlc.initialise_codes_(model, torch.stack([row for row in some if len(row) == LENGTH][:64]), seed=seed, progress=False)
    tlc.save(model, folder)


def collect(folder: Path, n_tokens: int) -> dict:
    """Collect, between two halves of the forward pass alone over the same batches."""
    from tl_codebook.attachment import sites
    from tl_codebook.store.reader import CodeReader
    from tl_codebook.store.sequences import SequenceSource, open_documents

    model = tlc.load(folder / "model")
    reader = CodeReader(model, list(sites(model).values()), BATCH * LENGTH)
    source = SequenceSource(
        open_documents(list(texts())), length=LENGTH, tokenizer=model.tokenizer, vocabulary=model.cfg.d_vocab, n_tokens=n_tokens
    )
    rows = source.take(n_tokens)
    batches = [[rows[i] for i in chosen] for chosen in reader._batches([len(row) for row in rows])]

    def forward(some: list) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for batch in some:
                tokens = np.zeros((len(batch), max(map(len, batch))), np.int64)
                for line, row in zip(tokens, batch, strict=True):
                    line[: len(row)] = row
                model(torch.from_numpy(tokens), return_type=None, padding_side="right")
        return time.perf_counter() - began

    forward(batches[:4])
    seconds = forward(batches[::2])
    memory_before = resident_bytes("VmHWM")
    began = time.perf_counter()
    store = tlc.collect_codes(
        model, list(texts()), folder / "store", n_tokens=n_tokens, context_length=LENGTH, batch_size=BATCH, progress=False, overwrite=True
    )
    collecting = time.perf_counter() - began
    seconds += forward(batches[1::2])
    with tlc.bypassed(model):
        base = forward(batches[::8]) * len(batches) / len(batches[::8])
    return {
        "n_tokens": store.n_tokens,
        "forward_tokens": sum(map(len, rows)),
        "bytes": store.nbytes,
        "seconds_forward": seconds,
        "seconds_forward_without_codebooks": base,
        "seconds_collect": collecting,
        "speed_of_forward": seconds / collecting * store.n_tokens / sum(map(len, rows)),
        "peak_bytes_before": memory_before,
        "peak_bytes": resident_bytes("VmHWM"),
    }


def read(folder: Path, seed: int) -> dict:
    """Open the store, ask the queries, and turn to pages of codes chosen at random, and of those in most use."""
    from tl_codebook.describe import describe_code
    from tl_codebook.store import match_text, search_codes

    opener = tlc.CodeStore  # loaded on use: not counted
    began = time.perf_counter()
    store = opener(folder / "store")
    opened = time.perf_counter() - began
    queries = {}
    for name, pattern in QUERIES.items():
        began = time.perf_counter()
        matches = match_text(store, pattern, timeout=60)
        scanned = time.perf_counter() - began
        began = time.perf_counter()
        hits = search_codes(store, matches)
        best = hits[0]
        queries[name] = {
            "pattern": pattern,
            "positions": len(matches.positions()),
            "seconds_scan": scanned,
            "seconds_search": time.perf_counter() - began,
            "best": {"code": best.label, "precision": best.precision, "recall": best.recall},
        }
    searching = resident_bytes("VmHWM")
    codes = [tlc.Code.parse(hit.label) for hit in search_codes(store, np.ones(store.n_tokens, bool), min_recall=0, n=None)]
    rng = np.random.default_rng(seed)
    pages = {}
    for name, some in {"in most use": codes[:100], "at random": [codes[i] for i in rng.choice(len(codes), 200, replace=False)]}.items():
        took = []
        for code in some:
            began = time.perf_counter()
            describe_code(store, code)
            took.append(time.perf_counter() - began)
        pages[name] = {"n": len(took), "median": statistics.median(took), "most": max(took)}
    return {
        "seconds_open": opened,
        "queries": queries,
        "n_codes": len(codes),
        "pages": pages,
        "peak_bytes_search": searching,
        "peak_bytes": resident_bytes("VmHWM"),
    }


def graph(seed: int) -> dict:
    """Count pairs of codes of two sites in two million tokens, k=8, codes drawn with frequencies that fall as 1 / rank."""
    from tests.unit.stored_codes import StoredCodes

    rng, found = np.random.default_rng(seed), {}
    for n_codes in (1024, 10_000):
        rates = 1 / np.arange(1, n_codes + 1)
        ids = [rng.choice(n_codes, (2_000_000, 1, 8), p=rates / rates.sum()).astype(np.uint16) for _ in range(2)]
        ids[1][:, 0, 0] = ids[0][:, 0, 0]  # every code goes with the one of its number
        store = StoredCodes({f"blocks.{i}.hook_mlp_out": each for i, each in enumerate(ids)}, n_codes)
        for name in store.sites:
            store.counts(name)  # builds the index, which a store on disk has
        began = time.perf_counter()
        made = tlc.coactivation_graph(store, progress=False, max_edges=n_codes)
        seconds = time.perf_counter() - began
        own = sum(made.has_edge(tlc.Code(0, "mlp_out", None, i), tlc.Code(1, "mlp_out", None, i)) for i in range(n_codes))
        found[str(n_codes)] = {"seconds": seconds, "n_significant": made.graph["n_significant"], "own": own}
    return found | {"peak_bytes": resident_bytes("VmHWM")}


def table(results: dict) -> str:
    of, reading = results["collect"], results["read"]
    lines = ["| a million tokens, 360 codes each | |", "|---|---|"]
    without = f"{of['seconds_forward_without_codebooks']:.0f} s without codebooks"
    lines.append(
        f"| collect, beside the forward pass of the codebook model over the same batches | {of['seconds_collect']:.0f} s beside "
        f"{of['seconds_forward']:.0f} s ({without}): **{of['speed_of_forward']:.0%}** of its speed |"
    )
    lines.append(f"| the store on disk | {of['bytes'] / 1e9:.2f} GB, opened in {1e3 * reading['seconds_open']:.0f} ms |")
    for name, row in reading["queries"].items():
        best, pattern = row["best"], row["pattern"].replace("|", "\\|")
        lines.append(
            f"| `{pattern}`: {name}, {row['positions']:,} tokens; best {best['code']}, precision {best['precision']:.0%}, recall "
            f"{best['recall']:.0%} | **{row['seconds_search']:.2f} s** over all {reading['n_codes']:,} codes, after "
            f"{row['seconds_scan']:.2f} s of matching |"
        )
    for name, row in reading["pages"].items():
        took = f"median {1e3 * row['median']:.0f} ms, at most {1e3 * row['most']:.0f} ms"
        lines.append(f"| a page of a code, {row['n']} codes {name} | {took} |")
    peaks = f"collecting {of['peak_bytes'] / 1e9:.2f} GB, searching and pages {reading['peak_bytes'] / 1e9:.2f} GB"
    lines.append(f"| peak of memory, mapped files included | {peaks} |")
    pairs = {name: row for name, row in results["graph"].items() if name.isdecimal()}
    for name, row in pairs.items():
        took = f"**{row['seconds']:.1f} s**, {row['n_significant']:,} edges that chance does not explain"
        lines.append(f"| co-activation graph of two sites of {int(name):,} codes, k=8, two million drawn positions | {took} |")
    at = results["where"]
    lines.append("")
    lines.append(
        f"stories260K, z: 8 heads x 256 codes, mlp_out: 1,024 codes, k=8, five layers, {of['n_tokens']:,} tokens of stories, "
        f"Shakespeare and speeches; {at['cpu']}, threads: {at['threads']}, torch {at['torch']}, TransformerLens "
        f"{at['transformer_lens']}, commit "
        f"{at['commit']}, seed {results['seed']}; `python -m tests.benchmarks.store`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the model and the store here, and use them where they are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["collect", "read", "graph"], help="run one part alone, and print it as JSON")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.out.read_text())))
        return
    torch.set_num_threads(1)
    if asked.part:
        parts = {"collect": lambda: collect(asked.folder, asked.tokens), "read": lambda: read(asked.folder, asked.seed)}
        print(json.dumps((parts | {"graph": lambda: graph(asked.seed)})[asked.part]()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        if not (folder / "model").exists():
            make_model(folder / "model", asked.seed)
        parts = {}
        for part in ("collect", "read", "graph"):
            argv = ["--part", part, "--folder", str(folder), "--tokens", str(asked.tokens), "--seed", str(asked.seed)]
            done = subprocess.run([sys.executable, "-m", "tests.benchmarks.store", *argv], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            parts[part] = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(parts[part], indent=2), flush=True)
    replace_json(asked.out, parts | {"seed": asked.seed, "where": where(torch.device("cpu"), 1)})


if __name__ == "__main__":
    main()
