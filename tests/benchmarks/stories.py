"""What codebooks cost a real language model: the stories model fine-tuned without codebooks, with our recipe, and with the paper's.

    python -m tests.benchmarks.stories            # runs, about half an hour on one core, and writes results/stories.json
    python -m tests.benchmarks.stories --table    # prints the README's table from it

All runs see the same tokens in the same order. Needs the shared model and texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tl_codebook.benchmarks import where

RESULTS = Path(__file__).with_name("results") / "stories.json"
SHARED = Path(__file__).resolve().parents[3] / "shared"
RUNS = {
    "none": ("fine-tuned, no codebooks", 0, "--recipe none"),
    "residual": ("tl_codebook's recipe: greedy pursuit", 8, "--k 8"),
    "nearest": ("with the nearest codes instead", 8, "--k 8 --selection nearest"),
    "grouped, equal": ("with 8 groups of mlp_out, one code each", 8, "--k 8 1 --n_groups 0 8"),
    "grouped": ("with 8 groups of mlp_out, k=8 in each", 64, "--k 8 --n_groups 0 8"),
    "paper": ("the paper's recipe", 8, "--k 8 --recipe paper"),
}
"""Name: what it is, the codes that mlp_out has at a time, and what it is run with."""
COMMON = "--sites z mlp_out --n_codes 256 1024 --context_length 256 --per_device_train_batch_size 8 --use_cpu --save_strategy no"


def run(name: str, steps: int, seed: int, extra: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["--dataset", str(SHARED / "data/stories-train.jsonl"), "--eval_dataset", str(SHARED / "data/stories-valid.jsonl")]
        argv = ["--model", str(SHARED / "models/stories260K"), *texts, *COMMON.split(), *RUNS[name][2].split(), *extra]
        argv += ["--max_steps", str(steps), "--seed", str(seed), "--output_dir", folder]
        subprocess.run([sys.executable, "-m", "tl_codebook", "train", *argv], check=True)
        result = json.loads((Path(folder) / "results.json").read_text())
    words = ["tl-codebook train", COMMON, RUNS[name][2], *extra, f"--max_steps {steps} --seed {seed}"]
    return result | {"name": name, "command": " ".join(words)}


def table(results: dict) -> str:
    lines = [
        "| stories260K, 5 layers: z (8 heads x 256 codes, k=8) + mlp_out (1,024 codes) | codes of mlp_out at a time | untrained: cost "
        "| trained: loss | cost of codes | accuracy | dead codes |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = {row["name"]: row for row in results["runs"]}
    without = runs["none"]["trained"]["loss"]
    lines.append(f"| before fine-tuning | | | {runs['none']['base']['loss']:.3f} | | {runs['none']['base']['accuracy']:.2%} | |")
    for name, row in runs.items():
        what, active, _ = RUNS[name]
        trained = row["trained"]
        cells = [f"{what}, {row['seconds']:.0f} s", "", "", f"{trained['loss']:.3f}", "", f"{trained['accuracy']:.2%}", ""]
        if name != "none":
            cells[1], cells[2] = str(active), f"{row['codes_at_start']['loss'] - without:+.3f}"
            cells[4], cells[6] = f"{trained['loss'] - without:+.3f}", f"{trained['dead_codes']:.1%}"
        lines.append(f"| {' | '.join(cells)} |")
    at = results["where"]
    lines.append("")
    lines.append(
        f"Held-out loss in nats per token, cost over the model fine-tuned without codebooks on the same {runs['none']['tokens']:,} tokens; "
        f"seed {results['runs'][0]['seed']}; {at['cpu']}, threads: {at['threads']}, torch {at['torch']}, TransformerLens "
        f"{at['transformer_lens']}, commit {at['commit']}; `python -m tests.benchmarks.stories`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", nargs="+", default=list(RUNS), choices=list(RUNS), help="'none' among them, which the others are held to."
    )
    args, extra = parser.parse_known_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    runs = [run(name, args.steps, args.seed, extra) for name in args.runs]
    at = where(torch.device("cpu"), runs[0]["threads"])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"runs": runs, "where": at}, indent=2) + "\n")
    print(table({"runs": runs, "where": at}))


if __name__ == "__main__":
    main()
