"""What `CodebookTrainer` writes while it runs: checkpoints that load, and runs that go on where they stopped, bit for bit."""

import json

import pytest
import torch
from transformers import TrainerCallback

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.hosts.training import MLP, TRAINED, assert_equal, codes, rows, trainer_of, weights, with_books
from tl_codebook.errors import CheckpointError, TrainingError
from tl_codebook.training import CodebookTrainingConfig

REVIVING = CodebookTrainingConfig(init_iterations=2, revive_every=2, revive_until=1.0)
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(params=TRAINED)
def kind(request):
    return request.param


class Kill(TrainerCallback):
    """Stop a run in the middle, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def usage(model):
    tensors = {}
    for name, point in tlc.sites(model).items():
        tensors |= {f"{name}/{key}": value.clone() for key, value in point.codebook.usage.tensors().items()}
    return tensors


# --- checkpoints ---


def test_checkpoints_load(kind, tmp_path):
    model = with_books(kind)
    trainer_of(model, tmp_path, REVIVING, save_strategy="steps", save_steps=2, max_steps=4).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    model.eval()
    first, last = tlc.load(tmp_path / "checkpoint-2"), tlc.load(tmp_path / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(last(TOKENS), model(TOKENS))
        assert not torch.equal(first(TOKENS), model(TOKENS))
    assert_equal(codes(last), codes(model))
    assert not any(path.name.startswith(".") for path in (tmp_path / "checkpoint-4").iterdir())


def test_a_trained_model_saves_and_loads_with_its_own_logits(kind, tmp_path):
    """On a Bridge around NeoX, q, k and v are copies: the fused weight of Hugging Face's model is never trained."""
    model = with_books(kind)
    with torch.no_grad():
        before = model(TOKENS)
    trainer_of(model, tmp_path / "run", max_steps=5, learning_rate=1e-2).train()
    model.eval()
    tlc.save(model, tmp_path / "model")
    again = tlc.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
        assert (again(TOKENS) - before).abs().max() > 0.1
    kept = model.state_dict()  # without the fused weights of NeoX, which nothing reads
    assert_equal({name: again.state_dict()[name] for name in kept}, kept)
    assert_equal(codes(again), codes(model))


def test_save_model_writes_what_load_reads(tmp_path):
    model = with_books(TRAINED[0])
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(tlc.load(tmp_path / "model")(TOKENS), model.eval()(TOKENS))


def test_the_best_model_comes_back(tmp_path):
    model = with_books(TRAINED[0])
    config = CodebookTrainingConfig(codes_learning_rate=3.0, commitment=0.25, init_iterations=2, revive_every=0)  # too high: the loss rises
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(model, tmp_path, config, **SAVING | best, eval_dataset=rows(6, seed=2))
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    step = min(losses, key=losses.get)
    assert step < 6
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert_equal(weights(model), weights(tlc.load(tmp_path / f"checkpoint-{step}")))


def test_save_total_limit(tmp_path):
    trainer_of(with_books(TRAINED[0]), tmp_path, **SAVING, save_total_limit=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


# --- going on ---


def test_a_killed_run_goes_on_bit_for_bit(kind, tmp_path):
    """Batches, schedule, Adam state, the counts that revival goes by and its choice of inputs: all as in the run that was not stopped."""
    settings = SAVING | {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = with_books(kind, n_codes=32)
    trainer = trainer_of(whole, tmp_path / "whole", REVIVING, **settings)
    trainer.train()
    stopped = with_books(kind, n_codes=32)
    trainable = [name for name, parameter in stopped.named_parameters() if parameter.requires_grad]
    with pytest.raises(KeyboardInterrupt):
        trainer_of(stopped, tmp_path / "stopped", REVIVING, **settings, callbacks=[Kill(5)]).train()
    assert [name for name, parameter in stopped.named_parameters() if parameter.requires_grad] == trainable
    resumed = with_books(kind, n_codes=32)  # from nothing but the folder
    torch.manual_seed(99)
    again = trainer_of(resumed, tmp_path / "stopped", REVIVING, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_equal(weights(resumed), weights(whole))
    assert_equal(usage(resumed), usage(whole))
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == [e["loss"] for e in trainer.state.log_history if "loss" in e]


def test_resuming_from_a_named_checkpoint(tmp_path):
    whole, resumed = with_books(TRAINED[0]), with_books(TRAINED[0])
    trainer_of(whole, tmp_path / "a", REVIVING, **SAVING).train()
    trainer_of(resumed, tmp_path / "b", REVIVING, **SAVING).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert_equal(weights(resumed), weights(whole))


def test_revival_changed_the_run_that_was_compared(tmp_path):
    with_it, without = with_books(TRAINED[0], n_codes=32), with_books(TRAINED[0], n_codes=32)
    trainer_of(with_it, tmp_path / "a", REVIVING, max_steps=6).train()
    trainer_of(without, tmp_path / "b", CodebookTrainingConfig(init_iterations=2, revive_every=0), max_steps=6).train()
    assert any(not torch.equal(codes(with_it)[name], value) for name, value in codes(without).items())


CHANGES = {
    "commitment": ({"config": CodebookTrainingConfig(init_iterations=2, revive_every=2, revive_until=1.0, commitment=0.5)}, r"commitment"),
    "seed": ({"seed": 7}, r"seed: 42 then, 7 now"),
    "batch": ({"per_device_train_batch_size": 2}, r"batch: 4 then, 2 now"),
    "fewer rows": ({"train_dataset": rows(12)}, r"rows: 16 then, 12 now"),
    "other rows": ({"train_dataset": rows(16, seed=4)}, r"data: "),
    "learning rate": ({"learning_rate": 5e-3}, r"learning_rate: 0\.001 then, 0\.005 now"),
    "schedule": ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type: 'constant' then, 'cosine' now"),
    "warm-up": ({"warmup_steps": 2}, r"warmup_steps: 0(\.0)? then, 2 now"),
    "beta 1": ({"adam_beta1": 0.8}, r"adam_beta1: 0\.9 then, 0\.8 now"),
    "beta 2": ({"adam_beta2": 0.9}, r"adam_beta2: 0\.999 then, 0\.9 now"),
    "epsilon": ({"adam_epsilon": 1e-6}, r"adam_epsilon: 1e-08 then, 1e-06 now"),
    "clipping": ({"max_grad_norm": 0.5}, r"max_grad_norm: 1\.0 then, 0\.5 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_changed_settings_lists_them(tmp_path, change):
    trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, save_strategy="steps", save_steps=2, max_steps=2).train()
    changed, message = CHANGES[change]
    model = with_books(TRAINED[0])
    before = weights(model)
    settings = {"config": REVIVING, "max_steps": 4} | changed
    with pytest.raises(TrainingError, match=message) as raised:
        trainer_of(model, tmp_path, **settings).train(resume_from_checkpoint=True)
    assert "belongs to another run" in str(raised.value)
    assert_equal(weights(model), before)


def test_resuming_for_more_steps_is_allowed(tmp_path):
    trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, save_strategy="steps", save_steps=2, max_steps=2).train()
    trainer = trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, max_steps=3)
    assert trainer.train(resume_from_checkpoint=True).global_step == 3


def test_resuming_from_what_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint of a codebook run"):
        trainer_of(with_books(TRAINED[0]), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_with_other_codebooks(tmp_path):
    trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, save_strategy="steps", save_steps=2, max_steps=2).train()
    other = with_books(TRAINED[0], n_codes=8)
    before = weights(other)
    with pytest.raises(CheckpointError, match="of another configuration"):
        trainer_of(other, tmp_path, REVIVING, max_steps=4).train(resume_from_checkpoint=True)
    assert_equal(weights(other), before)


@pytest.mark.parametrize("damage", ["manifest", "codes", "state", "trainer state"])
def test_resuming_from_a_damaged_checkpoint(tmp_path, damage):
    trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    names = {
        "manifest": "tl_codebook.json",
        "codes": "codes.*.safetensors",
        "state": "tl_codebook_training.json",
        "trainer state": "trainer_state.json",
    }
    target = names[damage]
    (path,) = folder.glob(target)
    path.write_bytes(path.read_bytes()[:-20])
    trainer = trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, max_steps=4)
    for named, error in ((True, TrainingError if path.suffix == ".json" else CheckpointError), (str(folder), CheckpointError)):
        with pytest.raises(error, match=rf"{path.name}.* (incomplete|damaged)"):
            trainer.train(resume_from_checkpoint=named)


@pytest.mark.parametrize("state", [{}, {"format_version": 2, "counts": {}, "run": {}}, {"format_version": 1, "counts": {}, "run": 3}])
def test_resuming_from_a_state_of_another_format(tmp_path, state):
    trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, save_strategy="steps", save_steps=2, max_steps=2).train()
    (tmp_path / "checkpoint-2/tl_codebook_training.json").write_text(json.dumps(state))
    with pytest.raises((CheckpointError, TrainingError), match=r"tl_codebook_training\.json|belongs to another run"):
        trainer_of(with_books(TRAINED[0]), tmp_path, REVIVING, max_steps=4).train(resume_from_checkpoint=True)


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    model = with_books(TRAINED[0])
    real, calls = tlc.save, []

    def full(model, folder, **kwargs):
        calls.append(folder)
        if len(calls) == 2:
            raise CheckpointError(f"{folder} could not be written (No space left on device).")
        return real(model, folder, **kwargs)

    monkeypatch.setattr("tl_codebook.training.trainer.save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer_of(model, tmp_path, REVIVING, **SAVING).train()
    monkeypatch.undo()
    resumed, whole = with_books(TRAINED[0]), with_books(TRAINED[0])
    trainer_of(resumed, tmp_path, REVIVING, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer_of(whole, tmp_path / "whole", REVIVING, max_steps=6).train()
    assert_equal(weights(resumed), weights(whole))
    assert MLP in codes(resumed)
