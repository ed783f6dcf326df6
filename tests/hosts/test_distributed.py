"""Two processes with half of the batch each train as one process with the whole."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.training import rows
from tests.tiny import HOSTS, write_hf_folder

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.hosts.training import rows, trainer_of, with_books, weights
from tl_codebook.training import CodebookTrainingConfig
import tl_codebook as tlc

kind, folder, batch, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
model = with_books(kind, n_codes=32)
config = CodebookTrainingConfig(init_iterations=2, revive_every=2, revive_until=1.0, **options)
batches = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
backend = {"ddp_backend": "gloo"} if batch < 4 else {}
trainer = trainer_of(model, folder / "run", config, max_steps=5, eval_dataset=rows(8, seed=2), **batches, **backend)
trainer.train()
metrics = trainer.evaluate()
rank = trainer.args.process_index
save_file({name: value.contiguous().clone() for name, value in weights(model).items()}, folder / f"rank{rank}.safetensors")
counts = {name: int(point.codebook.usage.counts.sum()) for name, point in tlc.sites(model).items()}
(folder / f"rank{rank}.json").write_text(json.dumps({"metrics": metrics, "counts": counts, "processes": trainer.accelerator.num_processes}))
"""


def launch(kind, folder, processes, options):
    """Run the program in so many processes, and return what each was left with."""
    folder.mkdir()
    script = folder / "program.py"
    script.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    call = [sys.executable]
    if processes > 1:
        call += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    done = subprocess.run(
        [*call, str(script), kind, str(folder), str(4 // processes), json.dumps(options)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    ranks = range(processes)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in ranks], [
        json.loads((folder / f"rank{r}.json").read_text()) for r in ranks
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [(f"{host}-gpt2", {}) for host in HOSTS] + [("bridge-gpt2", {"estimator": "rotation", "kl_to_base": 2.0, "ramp_steps": 3})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_two_processes_train_as_one(kind, options, tmp_path):
    """k-means in one process, revival by the counts and inputs of both; 1e-5 is the order in which gradients are added up."""
    (one,), (about,) = launch(kind, tmp_path / "one", 1, options)
    both, (first, second) = launch(kind, tmp_path / "two", 2, options)
    assert about["processes"] == 1
    assert first["processes"] == second["processes"] == 2
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), name
    # A bias of the keys moves no attention pattern: its gradient is rounding noise, which Adam makes steps of.
    key_biases = ("attn.b_K", "attn.k._original_component.bias", "attn.qkv._original_component.bias")
    for name, value in one.items():
        if name.endswith(key_biases):
            continue
        if ".qkv." in name:  # a Bridge computes with q, k and v apart; the fused weight that they came from is not used, and may go stale
            continue
        torch.testing.assert_close(both[0][name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, count in about["counts"].items():
        assert first["counts"][name] + second["counts"][name] == count
    for name in ("eval_loss", "eval_accuracy", "eval_dead_codes", "eval_code_perplexity", "eval_unexplained_variance"):
        assert first["metrics"][name] == pytest.approx(about["metrics"][name], rel=1e-4)
        assert second["metrics"][name] == pytest.approx(first["metrics"][name])
    assert len(rows()) == 16


@pytest.mark.slow
def test_accelerate_launch_runs_the_command_line_on_two_processes(tmp_path):
    write_hf_folder(tmp_path / "base")
    (tmp_path / "texts.txt").write_text(" ".join(f"w{3 + i % 58}" for i in range(2000)))
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    port = ["--main_process_port", "0"]
    what = ["-m", "tl_codebook", "train", "--model", str(tmp_path / "base"), "--dataset", str(tmp_path / "texts.txt"), "--use_cpu"]
    sizes = "--n_codes 16 --k 2 --max_steps 3 --context_length 16 --per_device_train_batch_size 4 --save_strategy no --disable_tqdm true"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *port, *what, *sizes.split(), "--output_dir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/results.json").read_text())["tokens"] == 3 * 4 * 2 * 16  # steps x rows x processes x tokens
    assert len(tlc.sites(tlc.load(tmp_path / "run/model"))) == 4
