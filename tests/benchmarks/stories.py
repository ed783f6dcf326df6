"""What codebooks cost a real language model: the stories model fine-tuned without codebooks, with our recipe, and with the paper's.

    python -m tests.benchmarks.stories            # runs, about ten minutes on one core, and writes results/stories.json
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
NAMES = {"none": "fine-tuned, no codebooks", "default": "tl_codebook's recipe", "paper": "the paper's recipe"}
COMMON = "--sites z mlp_out --n_codes 256 1024 --k 8 --context_length 256 --per_device_train_batch_size 8 --use_cpu --save_strategy no"


def run(recipe: str, steps: int, seed: int, extra: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["--dataset", str(SHARED / "data/stories-train.jsonl"), "--eval_dataset", str(SHARED / "data/stories-valid.jsonl")]
        argv = ["--model", str(SHARED / "models/stories260K"), *texts, *COMMON.split(), *extra]
        argv += ["--recipe", recipe, "--max_steps", str(steps), "--seed", str(seed), "--output_dir", folder]
        subprocess.run([sys.executable, "-m", "tl_codebook", "train", *argv], check=True)
        result = json.loads((Path(folder) / "results.json").read_text())
    words = ["tl-codebook train", COMMON, *extra, f"--recipe {recipe} --max_steps {steps} --seed {seed}"]
    result["command"] = " ".join(words)
    return result


def table(results: dict) -> str:
    lines = [
        "| stories260K, z (8 heads x 256 codes) + mlp_out (1,024), k=8, 5 layers | held-out loss | cost of codes | accuracy | dead codes |",
        "|---|---|---|---|---|",
    ]
    runs = {row["recipe"]: row for row in results["runs"]}
    without = runs["none"]["trained"]["loss"]
    lines.append(f"| before fine-tuning | {runs['none']['base']['loss']:.3f} | | {runs['none']['base']['accuracy']:.2%} | |")
    for recipe, row in runs.items():
        if recipe != "none":
            start = row["codes_at_start"]
            lines.append(
                f"| {NAMES[recipe]}, untrained | {start['loss']:.3f} | +{start['loss'] - without:.3f} | {start['accuracy']:.2%} "
                f"| {start['dead_codes']:.1%} |"
            )
        trained = row["trained"]
        cost = "" if recipe == "none" else f"+{trained['loss'] - without:.3f}"
        dead = "" if recipe == "none" else f"{trained['dead_codes']:.1%}"
        name = f"{NAMES[recipe]}, {row['tokens']:,} tokens, {row['seconds']:.0f} s"
        lines.append(f"| {name} | {trained['loss']:.3f} | {cost} | {trained['accuracy']:.2%} | {dead} |")
    at = results["where"]
    lines.append("")
    lines.append(
        f"Loss in nats per token; seed {results['runs'][0]['seed']}; {at['cpu']}, threads: {at['threads']}, torch {at['torch']}, "
        f"TransformerLens {at['transformer_lens']}, commit {at['commit']}; `python -m tests.benchmarks.stories`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=list(NAMES))
    args, extra = parser.parse_known_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    runs = [run(recipe, args.steps, args.seed, extra) for recipe in args.recipes]
    at = where(torch.device("cpu"), runs[0]["threads"])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"runs": runs, "where": at}, indent=2) + "\n")
    print(table({"runs": runs, "where": at}))


if __name__ == "__main__":
    main()
