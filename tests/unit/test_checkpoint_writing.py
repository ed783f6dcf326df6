"""Saving where a checkpoint is already: all or nothing, whatever happens in the middle."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import write_hf_folder
from tests.unit.test_checkpoint_faults import BOOK, TOKENS, make_model
from tests.unit.test_files import listing
from tl_codebook import Codebooks
from tl_codebook.errors import CheckpointError, CheckpointExistsError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def folder(model, tmp_path):
    tlc.save(model, tmp_path / "model")
    return tmp_path / "model"


def test_a_target_that_exists(folder):
    before = listing(folder)
    with pytest.raises(CheckpointExistsError, match=r"exists and is not empty\. Choose another folder, or say overwrite=True"):
        tlc.save(make_model(2), folder)
    assert listing(folder) == before


def test_overwriting_replaces_and_removes_what_is_stale(folder):
    (folder / "notes.txt").write_text("mine")
    other = make_model(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    before = set(listing(folder))
    tlc.save(other, folder, overwrite=True)
    assert torch.equal(tlc.load(folder)(TOKENS), other(TOKENS))
    after = listing(folder)
    assert after.pop("notes.txt") == b"mine"
    assert len([name for name in after if name.startswith("codes.")]) == len([name for name in after if name.startswith("model.")]) == 1
    assert len(after) == len(before) - 1
    Codebooks.of(other).save_pretrained(folder, overwrite=True)  # a model becomes codes alone
    assert sorted(path.name.split(".")[0] for path in folder.iterdir()) == ["codes", "notes", "tl_codebook"]


def test_overwriting_what_is_damaged(folder, model):
    (folder / "tl_codebook.json").write_text("{")
    tlc.save(model, folder, overwrite=True)
    assert torch.equal(tlc.load(folder)(TOKENS), model(TOKENS))


def test_saving_over_the_checkpoint_that_was_loaded(folder, model):
    """Its tensors may be mapped from the very file."""
    again = tlc.load(folder)
    before = again(TOKENS).clone()
    tlc.save(again, folder, overwrite=True)
    assert torch.equal(again(TOKENS), before)
    assert torch.equal(tlc.load(folder)(TOKENS), model(TOKENS))


def test_a_folder_that_cannot_be_written_to(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        tlc.save(model, tmp_path / "file", overwrite=True)
    assert listing(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("beside", [False, True], ids=["the base", "the base with codes beside it"])
def test_a_model_of_hugging_face_is_not_mixed_with_other_codes(model, tmp_path, beside):
    folder = write_hf_folder(tmp_path / "base", "gpt2")
    if beside:
        Codebooks.of(model).save_pretrained(folder, overwrite=True)  # this is what codes beside a base are
        Codebooks.of(model).save_pretrained(folder, overwrite=True)
    before = listing(folder)
    with pytest.raises(CheckpointExistsError, match=r"holds the weights of a Hugging Face model \('model.safetensors'\).*another folder"):
        tlc.save(model, folder, overwrite=True)
    assert listing(folder) == before


def test_a_folder_of_a_training_run_is_written_to_again(folder, model):
    names = ["training_args.bin", "optimizer.pt", "rng_state.pth", "training.0123456789ab.safetensors", "config.json", "results.json"]
    for name in names:
        (folder / name).write_text("{}")
    tlc.save(model, folder, overwrite=True)
    (folder / "tl_codebook.json").unlink()
    tlc.save(model, folder, overwrite=True)
    assert all((folder / name).is_file() for name in names)


def test_a_save_that_fails_leaves_no_folder(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tl_codebook.files.os.fsync", fail)
    for write in (lambda path: tlc.save(model, path), Codebooks.of(model).save_pretrained):
        with pytest.raises(CheckpointError, match="No space left on device"):
            write(tmp_path / "new/model")
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\)"):
        tlc.save(model, tmp_path / "new/model")


def test_the_home_folder_and_a_name_that_cannot_be(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tlc.save(model, "~/model")
    Codebooks.of(model).save_pretrained("~/codes")
    assert sorted(os.listdir(tmp_path)) == ["codes", "model"]
    assert torch.equal(tlc.load("~/model")(TOKENS), model(TOKENS))
    assert set(Codebooks.from_pretrained("~/codes")) == set(Codebooks.of(model))
    for call in (lambda: tlc.save(model, "a\0b"), lambda: tlc.load("a\0b"), lambda: Codebooks.from_pretrained("a\0b")):
        with pytest.raises(CheckpointError, match="NUL"):
            call()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_in_the_middle_of_a_save(folder, model, monkeypatch, at):
    """At the codes, the weights, the manifest: the checkpoint that was there is whole, and nothing temporary is left."""
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        real(file)

    before = listing(folder)
    monkeypatch.setattr("tl_codebook.files.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*untouched"):
        tlc.save(make_model(2), folder, overwrite=True)
    monkeypatch.undo()
    assert len(calls) == at
    after = listing(folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith(".") or ".tmp" in name or ".new" in name]
    assert torch.equal(tlc.load(folder)(TOKENS), model(TOKENS))


PROGRAM = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
import tl_codebook as tlc
from tests.unit.test_checkpoint_faults import make_model
at, seed, times = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
real, calls = os.fsync, []
def fsync(file):
    calls.append(file)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)
os.fsync = fsync
model = make_model(seed)
print("ready", flush=True)
for _ in range(times):
    tlc.save(model, sys.argv[2], overwrite=True)
"""


def start(folder, at, seed, times=1):
    call = [sys.executable, "-c", PROGRAM, str(REPOSITORY), str(folder), str(at), str(seed), str(times)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3], ids=["codes", "weights", "manifest"])
def test_a_kill_in_the_middle_of_a_save(folder, model, at):
    process = start(folder, at, seed=2)
    assert process.wait(timeout=120) == -signal.SIGKILL, process.stderr.read()
    assert torch.equal(tlc.load(folder)(TOKENS), model(TOKENS))
    tlc.save(make_model(3), folder, overwrite=True)
    assert torch.equal(tlc.load(folder)(TOKENS), make_model(3)(TOKENS))


def test_two_writers_at_once(folder):
    """Two threads save different codes to one folder over and over: what is there afterwards is one of them, complete."""
    models = [make_model(2), make_model(3)]
    expected = [Codebooks.of(m)[BOOK].codes.detach() for m in models]
    tlc.save(models[0], folder, overwrite=True)
    faults, stop = [], time.monotonic() + 2

    def write(model):
        try:
            while time.monotonic() < stop:
                Codebooks.of(model).save_pretrained(folder, overwrite=True)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    codes = Codebooks.from_pretrained(folder)[BOOK].codes.detach()
    assert any(torch.equal(codes, one) for one in expected)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_two_processes_save_to_one_folder(folder):
    processes = [start(folder, 0, seed, times=10) for seed in (2, 3)]
    for process in processes:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    logits = tlc.load(folder)(TOKENS)
    assert any(torch.equal(logits, make_model(seed)(TOKENS)) for seed in (2, 3))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
