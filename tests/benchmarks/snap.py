"""The README's tables of what a snap costs, from the committed rows of ``tl-codebook bench``.

python -m tests.benchmarks.snap                  # runs, about half an hour on one core, and writes results/snap_cpu.json
python -m tests.benchmarks.snap --backward       # results/snap_cpu_backward.json
python -m tests.benchmarks.snap --models         # results/models_cpu.json: the shared stories model and gpt2-small
python -m tests.benchmarks.snap --device cuda    # the same with _gpu
python -m tests.benchmarks.snap --table snap     # prints a table: snap, backward, models, original
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from tests.benchmarks.stories import SHARED
from tl_codebook.benchmarks.tables import bytes_text, seconds_text
from tl_codebook.cli import main as tl_codebook

RESULTS = Path(__file__).with_name("results")
ORIGINAL = RESULTS / "original.json"
NO_GPU = "not measured: no GPU was available"
COLUMNS = {
    "ours": "ours",
    "gemm": "GEMM alone",
    "definition": "definition",
    "paper": "original's arithmetic",
    "eager": "eager",
    "eager_tf32": "eager, TF32",
    "compile": "torch.compile",
    "faiss": "faiss",
}
OPS = {"forward": "forward", "train_step": "training step"}
KINDS = {"residual": "default (greedy pursuit)", "paper": "the paper's"}


def read(name: str) -> dict | None:
    """Return committed results, or None where nothing was measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def provenance(results: dict) -> str:
    at = results["where"]
    machine = at["cpu"] if at["device"] == "cpu" else at["device"]
    others = ["faiss"] if at["device"] == "cpu" else ["triton", "faiss"]
    versions = [f"torch {at['torch']}", *(f"{name} {at[name]}" for name in others if at.get(name))]
    return f"{machine}, threads: {at['threads']}, {', '.join(versions)}, commit {at['commit']}; `{results['command']}`."


def grouped(rows: list[dict]) -> list[dict[str, dict]]:
    """Gather the rows of a case: {peer: row}."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = tuple(row[field] for field in ("shape", "rows", "selection", "similarity", "dtype", "op"))
        cases.setdefault(key, {})[row["peer"]] = row
    return list(cases.values())


def cell(row: dict | None) -> str:
    if row is None or row["seconds"] is None:
        return ""
    wrong = f", {row['wrong_rows']:.1%} wrong" if row.get("wrong_rows") else ""
    return f"{row['ratio_to_gemm']:.2f}x{wrong}"


def lines_of(results: dict) -> list[str]:
    cases = grouped(results["rows"])
    others = [peer for peer in COLUMNS if peer not in ("ours", "gemm") and any(case.get(peer, {}).get("seconds") for case in cases)]
    names = ["ours", *(COLUMNS[peer] for peer in others)]
    lines = [
        f"| groups x width x codes x k, rows | GEMM alone | {' | '.join(names)} | extra memory: ours, eager |",
        "|---" * (len(names) + 3) + "|",
    ]
    for case in cases:
        row = case["ours"]
        how = f"{row['shape'].replace('x', ' x ')}, {row['rows']:,}" + (", greedy pursuit" if row["selection"] == "residual" else "")
        how += "" if row["dtype"] == "float32" else f", {row['dtype']}"
        memory = ", ".join(bytes_text(case[peer]["peak_bytes"]) if peer in case else "-" for peer in ("ours", "eager"))
        cells = [f"**{cell(row)}**", *(cell(case.get(peer)) for peer in others)]
        lines.append(f"| {how} | {seconds_text(case['gemm']['seconds'])} | {' | '.join(cells)} | {memory} |")
    checked = sum(row.get("checked_rows", 0) for case in cases for row in case.values() if row["peer"] == "ours")
    wrong = sum(row.get("wrong_rows", 0) * row.get("checked_rows", 0) for case in cases for row in case.values() if row["peer"] == "ours")
    clock = {"cpu": "CPU time", "wall": "wall time", "cuda": "CUDA events"}[cases[0]["gemm"]["clock"]]
    reps = len(cases[0]["gemm"]["rounds"])
    lines += [
        "",
        f"Times the GEMM alone; {clock}, medians of {reps} interleaved rounds. Ours against float64: {wrong:.0f} of {checked:,} vectors "
        f"got a code that float64 would not have chosen. {provenance(results)}",
    ]
    return lines


def snap_table(cpu: dict | None, gpu: dict | None) -> str:
    """Lay out the CPU table and the GPU table; what was not measured says so."""
    lines = lines_of(cpu) if cpu else ["CPU: not measured."]
    return "\n".join([*lines, "", *(lines_of(gpu) if gpu else [f"GPU: {NO_GPU}."])])


def model_table(cpu: dict | None, gpu: dict | None) -> str:
    """Lay out what codebooks cost whole models."""
    lines = ["| model, tokens | | without | with codebooks | ratio |", "|---|---|---|---|---|"]
    about = []
    for results, place in ((cpu, "CPU"), (gpu, "GPU")):
        if results is None:
            about.append(f"{place}: {NO_GPU if place == 'GPU' else 'not measured'}.")
            continue
        about.append(provenance(results))
        without = {(row["model"], row["op"]): row for row in results["models"] if row["codebooks"] == "none"}
        for row in results["models"]:
            if row["codebooks"] != "none":
                base = without[row["model"], row["op"]]["seconds"]
                what = f"{row['model']}, {row['batch']} x {row['pos']}, {place}"
                figures = f"{seconds_text(base)} | {seconds_text(row['seconds'])}, {KINDS[row['codebooks']]} | {row['ratio_to_none']:.2f}x"
                lines.append(f"| {what} | {OPS[row['op']]} | {figures} |")
    return "\n".join([*lines, "", "z: 256 codes per head, mlp_out: 1,024, k=8, every layer. " + " ".join(about)])


def original_table(results: dict | None) -> str:
    """Lay out ours beside the original library."""
    if results is None:
        return "Not measured."
    names = {"a": "12 heads x 64, 10,000 codes, k=8", "b": "width 768, 10,000 codes, k=100"}
    lines = ["| 1,024 vectors | | original | ours | original / ours, median (worst to best round) |", "|---|---|---|---|---|"]
    for case, took in results["cases"].items():
        rounds = took["ratio_per_round"]["ref/new"]
        op = "forward and backward" if case.endswith("_fwdbwd") else "forward"
        ratio = f"**{median(rounds):.1f}x** ({min(rounds):.1f} to {max(rounds):.1f})"
        figures = f"{seconds_text(took['ref']['median'])} | {seconds_text(took['new']['median'])} | {ratio}"
        lines.append(f"| {names[case[0]]} | {op} | {figures} |")
    check = results["check"]
    same = ", ".join(f"{check[f'{name}:ref vs new']['ids_equal_fraction']:.4%}" for name in names)
    lines += ["", f"Wall time, alternating rep by rep in two processes. The same ids in the same places: {same}. {provenance(results)}"]
    return "\n".join(lines)


TABLES = {
    "snap": lambda: snap_table(read("snap_cpu"), read("snap_gpu")),
    "backward": lambda: snap_table(read("snap_cpu_backward"), read("snap_gpu_backward")),
    "models": lambda: model_table(read("models_cpu"), read("models_gpu")),
    "original": lambda: original_table(read("original")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--models", action="store_true")
    args, extra = parser.parse_known_args()
    if args.table:
        print(TABLES[args.table]())
        return
    place = "cpu" if args.device == "cpu" else "gpu"
    argv = ["bench", "--device", args.device, *extra]
    if args.models:
        name = f"models_{place}"
        argv += ["--models", str(SHARED / "models/stories260K"), "gpt2-small"]
    else:
        name = f"snap_{place}" + ("_backward" if args.backward else "")
        argv += ["--backward"] if args.backward else []
    raise SystemExit(tl_codebook([*argv, "--json", str(RESULTS / f"{name}.json")]))


if __name__ == "__main__":
    main()
