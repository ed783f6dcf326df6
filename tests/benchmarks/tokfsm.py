"""The README's table of the machine whose states are known, from the committed figures of ``tl-codebook tokfsm``.

python -m tests.benchmarks.tokfsm --preset paper --seed 0    # runs, hours on a CPU, and writes results/tokfsm_paper_seed0.json
python -m tests.benchmarks.tokfsm --preset paper --seed 0 --model demos/tokfsm    # also keeps the model of that run, for the demo
python -m tests.benchmarks.tokfsm --table                    # prints the table from all committed figures
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tl_codebook import load, save
from tl_codebook.cli import main as tl_codebook
from tl_codebook.experiments.tokfsm import TokFSMSetting, evaluate_base, figure_rows
from tl_codebook.files import replace_json

RESULTS = Path(__file__).with_name("results")


def committed(preset: str) -> list[dict]:
    """Return the committed figures of a preset, seed by seed."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"tokfsm_{preset}_seed*.json"))]


def table() -> str:
    presets = {"paper": "100 states, 10 successors", "mini": "20 states, 4 successors"}
    runs = {preset: committed(preset) for preset in presets}
    runs = {preset: results for preset, results in runs.items() if results}
    columns = [(preset, results) for preset, several in runs.items() for results in several]
    head = ["", "published, 100 states"]
    for preset, results in columns:
        head += [f"{presets[preset]}: no codes", f"codes, seed {results['seed']}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for rows in zip(*(figure_rows(results) for _, results in columns), strict=True):
        cells = [rows[0].name.strip(), rows[0].published]
        for row in rows:
            cells += [row.base, f"**{row.codes}**" if row.codes else ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for preset, results in columns:
        at, stages, setting = results["where"], results["stages"], results["setting"]
        seconds = sum(stage["seconds"] for stage in stages.values())
        steps = " and ".join(f"{stage['steps']:,} steps ({name})" for name, stage in stages.items())
        n_codes = max(setting["z_codes"] + setting["mlp_codes"])
        lines.append(
            f"{presets[preset]}: {setting['architecture']}, {setting['n_layers']} layers, width {setting['d_model']}, k={setting['k']}, "
            f"at most {n_codes:,} codes; {steps} of {setting['batch_size']} rows, {seconds / 60:.0f} minutes; {at['cpu']}, threads: "
            f"{at['threads']}, torch {at['torch']}, commit {at['commit']}."
        )
    lines.append("Seeds: " + ", ".join(f"{len(several)} ({presets[preset]})" for preset, several in runs.items()) + ".")
    lines.append("`python -m tests.benchmarks.tokfsm --table`.")
    return "\n".join(lines)


def keep_model(run: Path, target: Path) -> None:
    """Save the model of a run in half precision, with its figures, and those of the rounded weights in fp32."""
    model = load(run / "model").to(torch.float16)
    save(model, target / "model", overwrite=True)
    results = json.loads((run / "results.json").read_text())
    rounded = evaluate_base(model.to(torch.float32), TokFSMSetting.from_dict(results["setting"]), seed=results["seed"])
    replace_json(target / "results.json", {**results, "rounded": rounded})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="The folder of the run; a resumed one goes on, a finished one is only read.")
    parser.add_argument("--model", type=Path, help="Also keep the model there.")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    run = args.run or Path(f"runs/tokfsm-{args.preset}-seed{args.seed}")
    argv = ["tokfsm", "--preset", args.preset, "--seed", str(args.seed), "--output_dir", str(run)]
    if tl_codebook([*argv, "--resume"]):
        raise SystemExit(1)
    replace_json(RESULTS / f"tokfsm_{args.preset}_seed{args.seed}.json", json.loads((run / "results.json").read_text()))
    if args.model:
        keep_model(run, args.model)


if __name__ == "__main__":
    main()
