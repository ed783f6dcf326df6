"""Ours beside the original library (codebook-features 0.1.2), each in its own environment, alternating rep by rep on the same tensors.

    python -m tests.benchmarks.original --reference REFERENCE_PYTHON --threads 1    # writes results/original.json

REFERENCE_PYTHON is the python of an environment set up as the README of the shared peers says. Only the ratio counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.snap import ORIGINAL, original_table
from tl_codebook.benchmarks import where
from tl_codebook.files import replace_json

PEERS = Path(__file__).resolve().parents[3] / "shared" / "peers"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True, help="python that has the original library")
    parser.add_argument("--inputs", type=Path, help="folder of make_inputs.py; made in a temporary one by default")
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ORIGINAL)
    args = parser.parse_args()
    environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        inputs = args.inputs or Path(folder) / "inputs"
        if not inputs.exists():
            subprocess.run([sys.executable, str(PEERS / "make_inputs.py"), str(inputs)], check=True, env=environment)
        ending = ["--inputs", str(inputs), "--threads", str(args.threads), "--serve"]
        run = [sys.executable, str(PEERS / "alternate.py"), "--check", "--reps", str(args.reps), "--out", f"{folder}/times.json"]
        run += ["--lib", "ref=" + shlex.join([args.reference, str(PEERS / "time_reference.py"), *ending])]
        run += ["--lib", "new=" + shlex.join([sys.executable, "-m", "tests.benchmarks.time_ours", *ending])]
        subprocess.run(run, check=True, env=environment, stdout=subprocess.DEVNULL)
        times = json.loads(Path(folder, "times.json").read_text())
    result = {
        "where": where(torch.device("cpu"), args.threads),
        "command": f"python -m tests.benchmarks.original --reference REFERENCE_PYTHON --reps {args.reps} --threads {args.threads}",
        **times,
    }
    replace_json(args.out, result)
    print(original_table(result))


if __name__ == "__main__":
    main()
