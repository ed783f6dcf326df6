"""`HostTrainer`: what it refuses, the gradients it stops at, and the checkpoints it takes up again and passes over.

What `CodebookTrainer` has from it is tested on that one too.
"""

import json
import warnings

import pytest
import torch
from transformers import TrainerCallback

import tl_codebook as tlc
from tests.hosts.training import MLP, TRAINED, arguments, assert_equal, host_of, rows, trainer_of, weights, with_books
from tl_codebook.base_model import BASE_MANIFEST, weights_of
from tl_codebook.errors import CheckpointError, CheckpointWarning, NonFiniteError, TrainingError
from tl_codebook.training import CodebookTrainingConfig
from tl_codebook.training.host_trainer import HostTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
PLAIN = CodebookTrainingConfig(init="none", revive_every=0)


@pytest.fixture(params=TRAINED)
def kind(request):
    return request.param


def host_trainer_of(model, folder, callbacks=(), **settings):
    return HostTrainer(model, arguments(folder, **settings), rows(), rows(6, seed=2), callbacks=list(callbacks))


class At(TrainerCallback):
    """Call a function at the beginning of one step, counted from 1."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.function()


def a_matrix(model):
    """A matrix of the second block, and what the model calls it."""
    own = next(parameter for parameter in model.blocks[1].mlp.parameters() if parameter.ndim == 2)
    return next(name for name, parameter in model.named_parameters() if parameter is own), own


def spoil(parameter, value, times=1):
    """Have the next gradients of a parameter hold a value that is no number."""
    left = [times]

    def change(gradient):
        if not left[0]:
            return gradient
        left[0] -= 1
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.view(-1)[3] = value
        return gradient

    parameter.register_hook(change)


# --- codebooks ---


def test_a_host_with_codebooks_is_evaluated_and_not_trained(kind, tmp_path):
    model = with_books(kind)
    before = weights(model)
    trainer = host_trainer_of(model, tmp_path)
    loss = trainer.evaluate()["eval_loss"]
    with pytest.raises(TrainingError, match=r"the host has codebooks \(at blocks\.0\..*Train it with CodebookTrainer, or .*detach"):
        trainer.train()
    assert_equal(weights(model), before)
    assert loss == pytest.approx(trainer_of(model, tmp_path, eval_dataset=rows(6, seed=2)).evaluate()["eval_loss"])
    tlc.detach(model)
    assert trainer.train().global_step == 3


# --- gradients ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_no_number_is_not_stepped_with(kind, tmp_path, value, accumulation):
    """In the first of the batches that add up to a step: what is added to it later is no number either."""
    model = host_of(kind)
    before = {}
    name, parameter = a_matrix(model)
    callbacks = [At(3, lambda: (before.update(weights(model)), spoil(parameter, value)))]
    settings = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    with pytest.raises(NonFiniteError, match=rf"^step 3: the gradients of {name} hold NaN or Inf.*The last checkpoint is untouched\.$"):
        host_trainer_of(model, tmp_path, callbacks, **settings).train()
    assert_equal(weights(model), before)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_without_a_checkpoint_none_is_spoken_of(tmp_path):
    model = host_of(TRAINED[0])
    spoil(a_matrix(model)[1], torch.nan)
    with pytest.raises(NonFiniteError, match=r"^step 1: .*often cures it\.$"):
        host_trainer_of(model, tmp_path).train()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_of_codes_that_is_no_number_names_the_codebook(kind, tmp_path, value):
    """Clipping would have made every gradient NaN, so it is looked for before."""
    model = with_books(kind)
    before = {}
    book = tlc.sites(model)[MLP].codebook
    callbacks = [At(2, lambda: (before.update(weights(model)), spoil(book.codes, value)))]
    trainer = trainer_of(model, tmp_path, PLAIN, callbacks=callbacks, save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteError, match=rf"^step 2: the gradients of {MLP} hold NaN or Inf.*checkpoint is untouched"):
        trainer.train()
    assert_equal(weights(model), before)


def test_codebooks_are_named_before_other_weights(tmp_path):
    model = with_books(TRAINED[0])

    def spoil_all():
        for parameter in model.parameters():
            if parameter.requires_grad:
                spoil(parameter, torch.nan)

    with pytest.raises(NonFiniteError, match="of " + ", ".join(tlc.sites(model)) + r" \(and of \d+ more\) hold NaN"):
        trainer_of(model, tmp_path, PLAIN, callbacks=[At(1, spoil_all)]).train()


def test_gradients_whose_norm_alone_is_too_large_are_clipped(tmp_path):
    """Their squares add up to more than fp32 holds, and they themselves do not."""
    model = host_of(TRAINED[0])
    a_matrix(model)[1].register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    assert host_trainer_of(model, tmp_path, max_grad_norm=1.0).train().global_step == 3


def test_under_a_gradient_scaler_the_scaler_skips_the_step(tmp_path):
    """It begins with a scale that makes gradients infinite, and halves it until they are not: that is how it is meant to work."""
    model = host_of(TRAINED[0])
    before = weights(model)
    trainer = host_trainer_of(model, tmp_path, max_steps=6, max_grad_norm=0.0)
    name, parameter = a_matrix(model)
    spoil(parameter, torch.inf, times=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1.0
    after = weights(model)
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(after[name], before[name])


# --- the best model, and going on ---


def test_the_best_model_comes_back(kind, tmp_path):
    model = host_of(kind)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2}
    kept = {}

    def ruin():
        kept.update({name: value.clone() for name, value in weights_of(model).items()})  # without fused weights that nothing reads
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-3.0)

    trainer = host_trainer_of(model, tmp_path, [At(3, ruin)], **SAVING | best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_equal(weights_of(model), kept)


@pytest.mark.parametrize("with_codes", [False, True], ids=["plain", "codes"])
def test_a_run_that_had_taken_its_last_step_takes_no_other(kind, tmp_path, with_codes):
    def trainer(model):
        if with_codes:
            return trainer_of(model, tmp_path, config=PLAIN, **SAVING)
        return host_trainer_of(model, tmp_path, **SAVING)

    model, other = (with_books(kind, "mlp_out") if with_codes else host_of(kind) for _ in range(2))
    trainer(model).train()
    again = trainer(other)
    assert again.train(resume_from_checkpoint=True).global_step == again.state.global_step == 6
    assert_equal(weights(again.hooked), weights(model))


def test_a_killed_run_goes_on_bit_for_bit(kind, tmp_path):
    settings = SAVING | {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    whole, resumed = host_of(kind), host_of(kind)
    host_trainer_of(whole, tmp_path / "whole", **settings).train()

    def kill():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host_trainer_of(host_of(kind), tmp_path / "stopped", [At(6, kill)], **settings).train()
    host_trainer_of(resumed, tmp_path / "stopped", **settings).train(resume_from_checkpoint=True)
    assert_equal(weights(resumed), weights(whole))


DAMAGES = {
    "empty state": ("trainer_state.json", lambda text: ""),
    "truncated state": ("trainer_state.json", lambda text: text[: len(text) // 2]),
    "state that is a list": ("trainer_state.json", lambda text: "[]"),
    "no state": ("trainer_state.json", None),
    "truncated manifest": ("manifest", lambda text: text[:40]),
    "no manifest": ("manifest", None),
}


@pytest.mark.parametrize("with_codes", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, damage, with_codes):
    def trainer():
        if with_codes:
            return trainer_of(with_books(TRAINED[0]), tmp_path, PLAIN, **SAVING)
        return host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING)

    whole = trainer()
    whole.train()
    name, change = DAMAGES[damage]
    path = tmp_path / "checkpoint-6" / {"manifest": "tl_codebook.json" if with_codes else BASE_MANIFEST}.get(name, name)
    path.unlink() if change is None else path.write_text(change(path.read_text()))
    named = trainer()
    before = weights(named.hooked)
    with pytest.raises(CheckpointError, match=rf"checkpoint-6 is no complete checkpoint of a .*run: .*{path.name}"):
        named.train(resume_from_checkpoint=str(path.parent))
    assert_equal(weights(named.hooked), before)
    resumed = trainer()
    with pytest.warns(CheckpointWarning, match=rf"passed over checkpoint-6: .*{path.name}.* goes on from .*checkpoint-4"):
        resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.hooked), weights(whole.hooked))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        assert trainer()._last_complete() == str(path.parent)  # it has been written again


def test_only_checkpoints_that_are_not_whole(tmp_path):
    trainer = host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING | {"max_steps": 2})
    trainer.train()
    (tmp_path / "checkpoint-2/trainer_state.json").write_text("")
    assert not trainer.has_checkpoint()
    with pytest.raises(
        TrainingError, match=r"holds no complete checkpoint to resume from \(checkpoint-2: trainer_state.json is incomplete"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_log_with_nan_in_it_is_no_damage(tmp_path):
    """`Trainer` writes what was measured, and JSON as Python has it knows NaN."""
    trainer = host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING | {"max_steps": 2})
    trainer.train()
    path = tmp_path / "checkpoint-2/trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][0]["grad_norm"] = float("nan")
    path.write_text(json.dumps(state))
    assert trainer.has_checkpoint()
    assert host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING).train(resume_from_checkpoint=True).global_step == 6


def test_a_manifest_that_goes_missing_under_way_gets_the_right_advice(tmp_path):
    trainer = host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"elsewhere holds no {BASE_MANIFEST}.*Train it again\.$"):
        trainer._load_best_model()


# --- the length of a run ---


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"lr_scheduler_type": "cosine"}, True),
        ({"lr_scheduler_type": "linear"}, True),
        ({"lr_scheduler_type": "constant"}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, True),
        ({"lr_scheduler_type": "inverse_sqrt"}, False),
    ],
)
def test_going_on_for_longer_is_warned_of_where_rates_hang_on_the_length(tmp_path, settings, warned):
    first = host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING | settings)
    first.train()
    rates = [entry["learning_rate"] for entry in first.state.log_history if "loss" in entry]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING | settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert not [w for w in seen if "steps" in str(w.message)]
        longer = host_trainer_of(host_of(TRAINED[0]), tmp_path / "other", **SAVING | settings | {"max_steps": 8})
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    told = [str(w.message) for w in seen if "one of 6 steps, and this one is of 8" in str(w.message)]
    assert len(told) == warned
    afresh = host_trainer_of(host_of(TRAINED[0]), tmp_path / "afresh", **SAVING | settings | {"max_steps": 8})
    afresh.train()
    expected = [entry["learning_rate"] for entry in afresh.state.log_history if "loss" in entry]
    assert (expected[:6] != rates) == warned


def test_a_run_from_before_its_schedule_was_noted_goes_on(tmp_path):
    host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING | {"max_steps": 2}).train()
    path = tmp_path / "checkpoint-2" / BASE_MANIFEST
    manifest = json.loads(path.read_text())
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"):
        del manifest["run"][name]
    del manifest["run"]["max_grad_norm"], manifest["model"]
    path.write_text(json.dumps(manifest))
    assert host_trainer_of(host_of(TRAINED[0]), tmp_path, **SAVING).train(resume_from_checkpoint=True).global_step == 6


def test_arguments_of_a_schedule_are_part_of_a_run(tmp_path):
    settings = SAVING | {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    host_trainer_of(host_of(TRAINED[0]), tmp_path, **settings).train()
    settings["lr_scheduler_kwargs"] = {"min_lr": 2e-4}
    with pytest.raises(TrainingError, match=r"lr_scheduler_kwargs: .*0\.0001.* then, .*0\.0002.* now"):
        host_trainer_of(host_of(TRAINED[0]), tmp_path, **settings).train(resume_from_checkpoint=True)
