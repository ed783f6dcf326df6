"""A k that falls during training: the numbers, what a step, an evaluation and a checkpoint see, and what is refused."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

import tl_codebook as tlc
from tests.hosts.training import TRAINED, assert_equal, host_of, rows, trainer_of, weights, with_books
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import ConfigError
from tl_codebook.training import CodebookTrainingConfig, k_at_step

KIND = TRAINED[0]
FALLING = CodebookTrainingConfig(init="none", revive_every=0, k_start=6, k_decay_steps=3)


class Watch(TrainerCallback):
    """Keep how many codes each step chose, by the ids that came out of a codebook; call a function after one step."""

    def __init__(self, model, after=None, function=None):
        self.book = next(iter(tlc.sites(model).values())).codebook
        self.seen, self.counted, self.after, self.function = {}, 0, after, function

    def on_step_end(self, args, state, control, **kwargs):
        usage = self.book.usage
        n_ids = int(usage.counts.sum()) // self.book.n_groups
        self.seen[state.global_step] = (n_ids - self.counted) // (4 * 12)
        self.counted = n_ids
        if state.global_step == self.after:
            self.function()


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 30), st.floats(0.2, 5))
def test_the_fall_never_rises_and_ends_at_its_end(k_end, more, decay_steps, power):
    ks = [k_at_step(step, k_start=k_end + more, k_end=k_end, decay_steps=decay_steps, power=power) for step in range(40)]
    assert all(k_end <= after <= before for before, after in itertools.pairwise(ks))
    assert ks[decay_steps - 1 :] == [k_end] * len(ks[decay_steps - 1 :])
    assert decay_steps == 1 or ks[0] == k_end + more


@pytest.mark.parametrize("selection", ["nearest", "residual"])
def test_a_codebook_chooses_as_many_codes_as_it_is_told_to(selection):
    torch.manual_seed(0)
    book, x = Codebook(8, CodebookConfig(9, k=2, n_groups=2, selection=selection)), torch.randn(5, 8)
    wide = Codebook(8, CodebookConfig(9, k=4, n_groups=2, selection=selection))
    wide.load_state_dict(book.state_dict())
    own = book(x)
    book.k_now = 4
    assert book.k == 4
    assert torch.equal(book.encode(x), wide.encode(x))
    assert torch.equal(book(x), wide(x))
    book.k_now = None
    assert torch.equal(book(x), own)
    assert book.config.k == book.k == 2


def test_every_step_chooses_its_own_number(tmp_path):
    model = with_books(KIND)
    watch = Watch(model)
    trainer = trainer_of(model, tmp_path, FALLING, max_steps=5, callbacks=[watch])
    trainer.train()
    assert watch.seen == {1: 6, 2: 4, 3: 2, 4: 2, 5: 2}
    assert [entry["k"] for entry in trainer.state.log_history if "loss" in entry] == [6, 4, 2, 2, 2]
    assert all(point.codebook.k_now is None for point in tlc.sites(model).values())


def test_codebooks_of_different_k_fall_to_their_own(tmp_path):
    model = host_of(KIND)
    tlc.attach(model, {"mlp_out": CodebookConfig(16, k=1), "z": CodebookConfig(16, k=3)})
    trainer = trainer_of(model, tmp_path, FALLING, max_steps=3)
    trainer.train()
    assert [entry["k"] for entry in trainer.state.log_history if "loss" in entry] == [6, (3 + 4) / 2, (1 + 3) / 2]


def test_no_schedule_changes_and_logs_nothing(tmp_path):
    model = with_books(KIND)
    trainer = trainer_of(model, tmp_path, CodebookTrainingConfig(init="none"))
    trainer.train()
    assert not any("k" in entry for entry in trainer.state.log_history)


def test_evaluations_and_checkpoints_are_of_the_own_k(tmp_path):
    model = with_books(KIND)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_dataset": rows(4)}
    trainer = trainer_of(model, tmp_path, FALLING, max_steps=2, **settings)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for step, loss in enumerate(logged, start=1):
        saved = tlc.load(tmp_path / f"checkpoint-{step}")
        assert {point.codebook.config.k for point in tlc.sites(saved).values()} == {2}
        assert trainer_of(saved, tmp_path / "other", FALLING, eval_dataset=rows(4)).evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_an_exception_leaves_the_own_k(tmp_path):
    model = with_books(KIND)

    def stop(module, args):
        assert next(iter(tlc.sites(model).values())).codebook.k == 6
        raise RuntimeError("stop")

    trainer = trainer_of(model, tmp_path, FALLING)
    trainer.model.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert {point.codebook.k for point in tlc.sites(model).values()} == {2}


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    config = CodebookTrainingConfig(init="none", revive_every=0, k_start=8, k_decay_steps=4)
    whole = with_books(KIND)
    trainer_of(whole, tmp_path / "whole", config, max_steps=4).train()
    trainer_of(with_books(KIND), tmp_path / "parts", config, max_steps=2, save_strategy="steps", save_steps=2).train()
    again = with_books(KIND)
    watch = Watch(again)
    watch.counted = (8 + 6) * 4 * 12  # of the two steps before, which the checkpoint brings back
    trainer_of(again, tmp_path / "parts", config, max_steps=4, callbacks=[watch]).train(resume_from_checkpoint=True)
    assert watch.seen == {3: 4, 4: 2}
    assert_equal(weights(again), weights(whole))


def test_resuming_with_another_schedule_is_refused(tmp_path):
    trainer_of(with_books(KIND), tmp_path, FALLING, max_steps=2, save_strategy="steps", save_steps=2).train()
    state = json.loads((tmp_path / "checkpoint-2/tl_codebook_training.json").read_text())
    assert state["run"]["config"]["k_start"] == 6
    other = CodebookTrainingConfig(init="none", revive_every=0, k_start=6, k_decay_steps=4)
    with pytest.raises(tlc.errors.TrainingError, match="belongs to another run"):
        trainer_of(with_books(KIND), tmp_path, other, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("k_start", [1, 17])
def test_a_k_that_a_codebook_cannot_start_from(tmp_path, k_start):
    config = CodebookTrainingConfig(k_start=k_start, k_decay_steps=3)
    with pytest.raises(ConfigError, match=rf"k_start={k_start} was asked for, and blocks.* has k=2 of n_codes=16\. .* give 2 to 16"):
        trainer_of(with_books(KIND), tmp_path, config)


@pytest.mark.parametrize("settings", [{"k_start": 4}, {"k_decay_steps": 4}])
def test_half_a_schedule_is_refused(settings):
    with pytest.raises(ConfigError, match=r"needs both"):
        CodebookTrainingConfig(**settings)
