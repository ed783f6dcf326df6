"""What each part of the recipe is worth: the 20-state machine, each run beside the same base, with one thing changed.

    python -m tests.benchmarks.tokfsm_ablation --seeds 0 1 2     # writes results/tokfsm_ablation.json after every run, and goes on from it
    python -m tests.benchmarks.tokfsm_ablation --table           # prints the README's table from it

A run takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tl_codebook.base_model import BASE_MANIFEST, restore_base_, save_base
from tl_codebook.benchmarks import where
from tl_codebook.experiments.tokfsm import (
    TokFSMSetting,
    adjusted_mutual_information,
    collect_at,
    evaluate_base,
    evaluate_codes,
    held_out_rows,
    make_model,
    matched_agreement,
    train_base_,
    train_codes_,
)
from tl_codebook.files import replace_json
from tl_codebook.names import Address
from tl_codebook.training.config import CodebookTrainingConfig

ROWS_OF_ALL = 10**6
"""Seed of the rows on which the codes of different seeds are compared."""
RESULTS = Path(__file__).with_name("results") / "tokfsm_ablation.json"
SETTING = TokFSMSetting.mini(
    batch_size=32, base_steps=1200, code_steps=400, held_out_rows=200, sampled_rows=500, forced_prefixes=3, dictionary_steps=20
)
VARIANTS: dict[str, tuple[str, dict, dict]] = {
    "default": ("the recipe", {}, {}),
    "no_kmeans": ("codes from noise instead of k-means", {"init": "none"}, {}),
    "no_revival": ("no revival of dead codes", {"revive_every": 0}, {}),
    "cosine": ("inner product instead of distance", {}, {"similarity": "inner_product"}),
    "layer_norm": ("LayerNorm before the snap", {}, {"input_norm": "layer_norm"}),
    "no_commitment": ("no commitment", {"commitment": 0.0}, {}),
    "small_commitment": ("commitment 0.25 instead of 1", {"commitment": 0.25}, {}),
    "summed": ("losses summed over dimensions", {"per_dimension": False}, {}),
    "no_lm_gradient": ("no language-model gradient to the codes", {"lm_gradient_to_codes": False}, {}),
    "rotation": ("with the rotation trick", {"estimator": "rotation"}, {}),
    "kl": ("with KL to the base, weight 1", {"kl_to_base": 1.0}, {}),
    "kl4": ("with KL to the base, weight 4", {"kl_to_base": 4.0}, {}),
    "kl4_rotation": ("with KL to the base, weight 4, and the rotation trick", {"kl_to_base": 4.0, "estimator": "rotation"}, {}),
    "ramp": ("with a ramp over the first quarter", {"ramp_steps": 100}, {}),
    "paper_from_base": (
        "the paper's recipe, from the base",
        CodebookTrainingConfig.paper().to_dict(),
        {"similarity": "inner_product", "input_norm": "layer_norm"},
    ),
    "paper": ("the paper's recipe, from scratch", {}, {"recipe": "paper"}),
}
"""Name: what it is, and what is changed in the training and in the setting."""


def setting_of(name: str) -> TokFSMSetting:
    _, training, fields = VARIANTS[name]
    return replace(SETTING, training=CodebookTrainingConfig(**training), **fields)


def run(name: str, seed: int, folder: Path) -> dict:
    """Train the base of a seed if it is not there yet, then the codes of a variant on it, and measure."""
    setting = setting_of(name)
    model = make_model(setting, seed)
    base = None
    if "base" in setting.steps:
        kept = folder / f"base-{seed}"
        if not (kept / BASE_MANIFEST).is_file():
            train_base_(model, SETTING, folder / f"training-base-{seed}", seed=seed)
            save_base(model, kept, figures=evaluate_base(model, SETTING, seed=seed), setting=SETTING.to_dict())
        about = restore_base_(model, kept)
        if about["setting"] != json.loads(json.dumps(SETTING.to_dict())):
            raise SystemExit(f"{kept} holds the base of another setting. Give another --folder.")
        base = about["figures"]
    took = train_codes_(model, setting, folder / f"training-{name}-{seed}", seed=seed)
    figures = evaluate_codes(model, setting, seed=seed, progress=False)
    figures["state_codes"].pop("controls")  # of a dictionary that was hardly trained
    keep = ("excess", "accuracy", "valid_transitions", "dead", "state_codes", "decode", "best_site", "purity", "automaton", "forcing")
    result = {"variant": name, "seed": seed, "base": base, "stage": took._asdict(), "codes": {key: figures[key] for key in keep}}
    result["where"] = where(torch.device(took.device), torch.get_num_threads())
    return result | ({"state_codes": codes_of_states(model, setting, figures["automaton"]["site"])} if name == "default" else {})


def codes_of_states(model, setting: TokFSMSetting, site: str) -> list[int]:
    """Return the code of a site at each state of a text that is the same for all seeds: what seeds are compared by."""
    rows = held_out_rows(setting, seed=ROWS_OF_ALL)[:50]
    ids = collect_at(model, rows, {"ids": f"{Address.parse(site).hook_name}.hook_codes"})["ids"]
    digits = setting.machine().n_digits
    return ids[:, digits::digits, 0].flatten().tolist()


def agreement(runs: list[dict]) -> dict | None:
    """Return how far the codes of each two seeds mean the same."""
    codes = [torch.tensor(row["state_codes"]) for row in runs if "state_codes" in row]
    pairs = list(itertools.combinations(codes, 2))
    if not pairs:
        return None
    ami = [adjusted_mutual_information(a, b) for a, b in pairs]
    return {"adjusted_mutual_information": ami, "matched": [matched_agreement(a, b) for a, b in pairs], "pairs": len(pairs)}


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def percents(values: list[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * sum(values) / len(values):.1f} % ({low:.1f} to {high:.1f})"


def table(results: dict) -> str:
    runs = results["runs"]
    seeds = sorted({row["seed"] for row in runs})
    head = (
        "20 states, z and mlp_out, k=1: mean (least to greatest)",
        "seeds",
        "loss over Bayes",
        "valid transitions",
        "dead codes",
        "state by one code",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    bases = [row["base"] for row in runs if row["variant"] == "default"]
    cells = (spread([base["excess"] for base in bases]), percents([base["valid_transitions"] for base in bases]))
    lines.append(f"| the base, no codes | {len(bases)} | {cells[0]} | {cells[1]} | | |")
    for name, (what, _, _) in VARIANTS.items():
        codes = [row["codes"] for row in runs if row["variant"] == name]
        if codes:
            decode = [figures["decode"][figures["best_site"]]["accuracy"] for figures in codes]
            cells = (spread([figures["excess"] for figures in codes]), percents([figures["valid_transitions"] for figures in codes]))
            dead = percents([figures["dead"]["share"] for figures in codes])
            lines.append(f"| {what} | {len(codes)} | {cells[0]} | {cells[1]} | {dead} | {percents(decode)} |")
    at = next(row["where"] for row in runs)
    commits = sorted({str(row["where"]["commit"]) for row in runs})
    lines.append("")
    if results.get("agreement"):
        same, ami = results["agreement"]["matched"], results["agreement"]["adjusted_mutual_information"]
        lines.append(
            f"The codes of states of two seeds, the recipe: adjusted mutual information {spread(ami)}, the same under the best matching at "
            f"{percents(same)} of the positions."
        )
    lines.append(
        f"Seeds {', '.join(map(str, seeds))}; {SETTING.code_steps} steps of {SETTING.batch_size} rows for the codes, {SETTING.base_steps} "
        f"before for the base (the paper's recipe from scratch: as many in all); {at['cpu']}, threads: {at['threads']}, "
        f"torch {at['torch']}, commit {', '.join(commits)}; `python -m tests.benchmarks.tokfsm_ablation`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--folder", help="Where bases and checkpoints are kept; a temporary one by default.")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for name in args.variants:
                if any((row["variant"], row["seed"]) == (name, seed) for row in results["runs"]):
                    continue
                results["runs"].append(run(name, seed, Path(args.folder or scratch)))
                results["agreement"] = agreement(results["runs"])
                replace_json(RESULTS, results)
                print(table(results), flush=True)


if __name__ == "__main__":
    main()
