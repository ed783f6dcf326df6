"""Options of `CodebookTrainer` that are off by default: another estimator, a divergence from the base, a ramp; and runs that go on."""

import json

import pytest
import torch
from transformers import TrainerCallback

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.hosts.training import MLP, TRAINED, arguments, assert_equal, base_weights, codes, host_of, rows, trainer_of, weights, with_books
from tl_codebook.errors import TrainingError
from tl_codebook.training import CodebookTrainingConfig, collate
from tl_codebook.training.host_trainer import HostTrainer
from tl_codebook.training.losses import LanguageModel
from tl_codebook.training.teacher import BaseTeacher

PLAIN = {"init": "none", "revive_every": 0}
EVERYTHING = {
    "estimator": "rotation",
    "kl_to_base": 2.0,
    "kl_steps": 5,
    "ramp_steps": 4,
    "init_iterations": 2,
    "revive_every": 2,
    "revive_until": 1.0,
}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(params=TRAINED)
def kind(request):
    return request.param


class Each(TrainerCallback):
    """Call a function at the end of each step, with the number of the step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


def books(model):
    return [point.codebook for point in tlc.sites(model).values()]


def move(model):
    """Change every weight that can be trained, codes included."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def move_seeded(model):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        move(model)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- the teacher ---


def memory(model):
    """Where every parameter lies, and how."""
    return {
        name: (id(p), p.data_ptr(), p.untyped_storage().data_ptr(), p.storage_offset(), p.stride(), p.shape, p.requires_grad, p.is_leaf)
        for name, p in model.named_parameters()
    }


def test_a_teacher_is_the_base_of_then_and_leaves_the_model_of_now(kind):
    """On a Bridge around GPT-2 q, k and v are views of one matrix, and have to stay that."""
    model = with_books(kind)
    with torch.no_grad(), tlc.bypassed(model):
        before = model(TOKENS)
    teacher = BaseTeacher(model)
    move(model)
    model.train()
    model.blocks[0].eval()  # as a user may who wants no dropout there
    modes, here, now = [module.training for module in model.modules()], memory(model), weights(model)
    counted = [int(book.usage.n_vectors) for book in books(model)]
    during = []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: during.extend(m.training for m in model.modules()))]):
        logits = teacher.logits(TOKENS)
    assert not any(during)
    assert torch.equal(logits, before)
    assert not logits.requires_grad
    assert memory(model) == here
    assert_equal(weights(model), now)
    assert [module.training for module in model.modules()] == modes
    assert all(point.enabled for point in tlc.sites(model).values())
    assert [int(book.usage.n_vectors) for book in books(model)] == counted
    with torch.no_grad(), tlc.bypassed(model):
        assert not torch.equal(model(TOKENS), before)
    move(model)
    assert torch.equal(teacher.logits(TOKENS), before)


def test_a_teacher_that_fails_leaves_everything_as_it_was(kind):
    model = with_books(kind)
    teacher = BaseTeacher(model)
    move(model)
    model.train()
    here, now = memory(model), weights(model)

    def stop(value, hook):
        raise RuntimeError("stop")

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", stop)]), pytest.raises(RuntimeError, match="stop"):
        teacher.logits(TOKENS)
    assert memory(model) == here
    assert_equal(weights(model), now)
    assert all(module.training for module in model.modules())
    assert all(point.enabled for point in tlc.sites(model).values())
    assert torch.is_autocast_cache_enabled()


def test_a_codebook_that_is_off_stays_off():
    model = with_books(TRAINED[0])
    teacher = BaseTeacher(model)
    with tlc.bypassed(model, MLP):
        teacher.logits(TOKENS)
        assert [name for name, point in tlc.sites(model).items() if not point.enabled] == [MLP]


def test_a_base_that_cannot_move_is_not_copied(kind):
    model = with_books(kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    teacher = BaseTeacher(model)
    assert teacher._weights == []
    with torch.no_grad(), tlc.bypassed(model):
        assert torch.equal(teacher.logits(TOKENS), model(TOKENS))


def test_memory_is_copied_once_however_many_weights_share_it():
    """A frozen matrix whose parts train moves with them, so it is copied too."""
    model = with_books("bridge-gpt2")
    shared = {p.untyped_storage().data_ptr() for p in model.parameters() if p.data.stride() == (1, 96)}
    fused = [p for p in model.parameters() if p.untyped_storage().data_ptr() in shared and p.shape == (32, 96)]
    assert len(fused) == len(shared) == 2
    for parameter in fused:
        parameter.requires_grad_(False)
    weights_of = {id(parameter): copy for parameter, copy in BaseTeacher(model)._weights}
    for parameter in fused:
        copy = weights_of[id(parameter)]
        parts = [p for p in model.parameters() if p.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()]
        assert len(parts) == 4
        assert {weights_of[id(part)].untyped_storage().data_ptr() for part in parts} == {copy.untyped_storage().data_ptr()}
        assert copy.data_ptr() != parameter.data_ptr()


def test_the_digest_tells_one_base_from_another_and_knows_no_codebooks(kind):
    first, second = with_books(kind), with_books(kind, "mlp_out", n_codes=8)
    assert BaseTeacher(first).digest == BaseTeacher(second).digest
    with torch.no_grad():
        weight = next(parameter for name, parameter in second.named_parameters() if ".codebook." not in name)
        weight.view(-1)[-1].add_(1e-3)
    assert BaseTeacher(first).digest != BaseTeacher(second).digest


def test_autocast_keeps_no_weight_of_the_teacher(kind):
    """Its cache holds a weight in half precision until the pass is over: the student's would be the teacher's, without a gradient."""
    model, batch = with_books(kind), collate(rows(4))
    teacher = BaseTeacher(model)
    move(model)
    results = []
    for weight in (0.0, 1e-6):
        model.zero_grad()
        wrapped = LanguageModel(model, CodebookTrainingConfig(kl_to_base=weight)).train()
        wrapped.teacher = teacher
        with torch.autocast("cpu", torch.bfloat16):
            out = wrapped(**batch)
        out["loss"].backward()
        results.append((out["logits"].detach(), {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert len(results[0][1]) > 20


# --- the divergence in a run ---


def kl_of(model, base_logits, data):
    """Mean KL(base || model) over the tokens predicted, in nats."""
    batch = collate(data)
    with torch.no_grad():
        p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (base_logits, model(batch["input_ids"])))
    return float((p.exp() * (p - q)).sum(-1)[batch["labels"][:, 1:] != -100].mean())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_of_a_step_has_the_divergence_in_it(kind, tmp_path, accumulation):
    model, data = with_books(kind), rows(4)
    with torch.no_grad(), tlc.bypassed(model):
        base = model(collate(data)["input_ids"])
    kl = kl_of(model, base, data)
    assert kl > 0.1
    batches = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    settings = {"train_dataset": data, "max_steps": 1, **batches}
    plain, with_kl = (
        trainer_of(with_books(kind), tmp_path, CodebookTrainingConfig(**PLAIN, kl_to_base=weight), **settings) for weight in (0.0, 1.5)
    )
    plain.train()
    with_kl.train()
    assert losses(with_kl)[0] - losses(plain)[0] == pytest.approx(1.5 * kl, rel=1e-3)


def test_a_model_that_is_held_to_its_base_stays_closer(tmp_path):
    """And the teacher is gone when the run is, or has failed."""
    distances = []
    for weight in (0.0, 20.0):
        model, data = with_books(TRAINED[0]), rows(16)
        with torch.no_grad(), tlc.bypassed(model):
            base = model(collate(data)["input_ids"])
        config = CodebookTrainingConfig(init_iterations=2, revive_every=0, kl_to_base=weight)
        trainer = trainer_of(model, tmp_path, config, max_steps=15, train_dataset=data)
        trainer.train()
        assert trainer.model.teacher is None
        distances.append(kl_of(model.eval(), base, data))
    assert distances[1] < 0.7 * distances[0]

    def stop(module, args):
        assert trainer.model.teacher is not None
        raise RuntimeError("stop")

    trainer.model.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert trainer.model.teacher is None


def test_the_divergence_fades_out_and_then_costs_no_pass(tmp_path, monkeypatch):
    passes = []
    of_base = BaseTeacher.logits

    def counted(self, *args, **kwargs):
        passes.append(trainer.state.global_step)
        return of_base(self, *args, **kwargs)

    monkeypatch.setattr(BaseTeacher, "logits", counted)
    model = with_books(TRAINED[0])
    trainer = trainer_of(model, tmp_path, CodebookTrainingConfig(**PLAIN, kl_to_base=2.0, kl_steps=2), max_steps=4, logging_steps=1)
    trainer.train()
    assert [entry["kl_weight"] for entry in trainer.state.log_history if "loss" in entry] == [2.0, 1.0, 0.0, 0.0]
    assert passes == [0, 1]


def test_a_weight_that_fades_is_in_the_loss(tmp_path):
    configs = [CodebookTrainingConfig(kl_to_base=weight, kl_steps=4) for weight in (2.0, 1.0)]
    faded, half = (LanguageModel(with_books(TRAINED[0]), config).train() for config in configs)
    for language_model in (faded, half):
        language_model.teacher = BaseTeacher(language_model.hooked)
        move_seeded(language_model.hooked)
    faded.set_step(2)
    half.set_step(0)
    assert torch.equal(faded(TOKENS, labels=TOKENS)["loss"], half(TOKENS, labels=TOKENS)["loss"])
    faded.set_step(4)
    assert faded(TOKENS, labels=TOKENS)["loss"] < half(TOKENS, labels=TOKENS)["loss"]


def test_a_frozen_base_is_its_own_teacher(kind, tmp_path):
    model = with_books(kind)
    base = base_weights(model)
    seen = []
    watch = Each(lambda step: seen.append(len(trainer.model.teacher._weights)))
    config = CodebookTrainingConfig(**PLAIN, freeze_base=True, kl_to_base=1.0)
    trainer = trainer_of(model, tmp_path, config, callbacks=[watch])
    trainer.train()
    assert seen == [0] * 3
    assert_equal(base_weights(model), base)


def test_a_host_without_codebooks_has_no_base_to_diverge_from(tmp_path):
    trainer = HostTrainer(host_of(TRAINED[0]), arguments(tmp_path), rows(), config=CodebookTrainingConfig(kl_to_base=1.0))
    with pytest.raises(TrainingError, match="no base to compare with"):
        trainer.train()


# --- the estimator ---


def test_the_estimator_is_that_of_the_configuration_while_training(tmp_path):
    """One step of plain gradient descent: the codes of the last site move as they did, what comes before every site does not."""
    seen, after, codes_after = [], [], []
    for estimator in ("straight_through", "rotation"):
        model = with_books(TRAINED[0])
        watch = Each(lambda step, model=model: seen.append({book.estimator for book in books(model)}))
        config = CodebookTrainingConfig(**PLAIN, estimator=estimator, codes_learning_rate=0.1)
        trainer = trainer_of(model, tmp_path, config, max_steps=1, callbacks=[watch], optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        trainer.train()
        assert {book.estimator for book in books(model)} == {"straight_through"}
        after.append(weights(model))
        codes_after.append(codes(model))
    assert seen == [{"straight_through"}, {"rotation"}]
    plain, rotated = after
    assert [name for name, value in codes_after[0].items() if torch.equal(value, codes_after[1][name])] == [MLP]
    assert sum(torch.equal(value, rotated[name]) for name, value in plain.items()) < len(plain) / 2


# --- the ramp ---


def test_every_step_has_its_strength(kind, tmp_path):
    model = with_books(kind)
    seen, data = [], rows(4)
    trainer = trainer_of(model, tmp_path, CodebookTrainingConfig(**PLAIN, ramp_steps=4), max_steps=6, eval_dataset=data)
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append({book.strength for book in books(model)}))
    trainer.train()
    assert seen == [{0.0}, {0.25}, {0.5}, {0.75}, {1.0}, {1.0}]
    assert [entry["strength"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert {book.strength for book in books(model)} == {1.0}


def test_after_the_ramp_every_bit_is_that_of_a_run_without(kind, tmp_path):
    """No weight moves, so that the losses of every step can be compared; the first is that of the base and the codebooks' terms."""
    rates = {"learning_rate": 0.0, "max_steps": 5}
    runs = []
    for ramp_steps in (0, 3):
        config = CodebookTrainingConfig(**PLAIN, ramp_steps=ramp_steps, codes_learning_rate=0.0, reconstruction=0.0, commitment=0.0)
        trainer = trainer_of(with_books(kind), tmp_path, config, **rates, train_dataset=rows(4))
        trainer.train()
        runs.append(losses(trainer))
    without, ramped = runs
    assert all(first != second for first, second in zip(without[:3], ramped[:3], strict=True))
    assert ramped[3:] == without[3:]
    with tlc.bypassed(trainer.hooked):
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(ramped[0], rel=1e-5)


def test_no_ramp_logs_nothing(tmp_path):
    trainer = trainer_of(with_books(TRAINED[0]), tmp_path, CodebookTrainingConfig(**PLAIN))
    trainer.train()
    assert not any("strength" in entry for entry in trainer.state.log_history)


def test_evaluations_and_checkpoints_in_a_ramp_snap(tmp_path):
    model = with_books(TRAINED[0])
    config = CodebookTrainingConfig(**PLAIN, ramp_steps=10)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_dataset": rows(4)}
    trainer = trainer_of(model, tmp_path, config, max_steps=2, **settings)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2
    for step, loss in enumerate(logged, start=1):
        saved = tlc.load(tmp_path / f"checkpoint-{step}")
        got = trainer_of(saved, tmp_path / "other", CodebookTrainingConfig(**PLAIN), eval_dataset=rows(4)).evaluate()["eval_loss"]
        assert got == pytest.approx(loss, rel=1e-5)


def test_a_run_that_fails_in_a_ramp_leaves_whole_snaps(tmp_path):
    model = with_books(TRAINED[0])

    def stop(module, args):
        assert {book.strength for book in books(model)} == {0.0}
        raise RuntimeError("stop")

    trainer = trainer_of(model, tmp_path, CodebookTrainingConfig(**EVERYTHING))
    trainer.model.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert {(book.strength, book.estimator) for book in books(model)} == {(1.0, "straight_through")}


# --- going on ---


def test_a_run_with_every_option_goes_on_bit_for_bit(kind, tmp_path):
    settings = SAVING | {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    config = CodebookTrainingConfig(**EVERYTHING)
    whole = with_books(kind, n_codes=32)
    trainer = trainer_of(whole, tmp_path / "whole", config, **settings)
    trainer.train()

    def kill(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(with_books(kind, n_codes=32), tmp_path / "stopped", config, **settings, callbacks=[Each(kill)]).train()
    resumed = with_books(kind, n_codes=32)
    again = trainer_of(resumed, tmp_path / "stopped", config, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_equal(weights(resumed), weights(whole))
    assert losses(again) == losses(trainer)
    assert [e["strength"] for e in again.state.log_history if "loss" in e] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("freeze_base", [False, True])
def test_going_on_with_another_base_is_refused(tmp_path, freeze_base):
    config = CodebookTrainingConfig(**PLAIN, kl_to_base=1.0, freeze_base=freeze_base)
    trainer_of(with_books(TRAINED[0]), tmp_path, config, max_steps=2, save_strategy="steps", save_steps=2).train()
    other = with_books(TRAINED[0])
    with torch.no_grad():
        other.unembed.W_U.data[0, 0] += 1e-3
    before = weights(other)
    with pytest.raises(TrainingError, match=r"belongs to another run \(base: '[0-9a-f]{16}' then, '[0-9a-f]{16}' now\)"):
        trainer_of(other, tmp_path, config, max_steps=4).train(resume_from_checkpoint=True)
    assert_equal(weights(other), before)


def test_without_a_divergence_any_base_will_do(tmp_path):
    """The checkpoint brings its own."""
    config = CodebookTrainingConfig(**PLAIN)
    whole, other = with_books(TRAINED[0]), with_books(TRAINED[0])
    trainer_of(whole, tmp_path, config, **SAVING).train()
    move(other)
    trainer_of(other, tmp_path, config, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal(weights(other), weights(whole))


def test_runs_from_before_the_options_go_on_without_them(tmp_path):
    config = CodebookTrainingConfig(**PLAIN)
    trainer_of(with_books(TRAINED[0]), tmp_path, config, max_steps=2, save_strategy="steps", save_steps=2).train()
    path = tmp_path / "checkpoint-2/tl_codebook_training.json"
    about = json.loads(path.read_text())
    for name in ("estimator", "kl_to_base", "ramp_steps"):
        del about["run"]["config"][name]
    path.write_text(json.dumps(about))
    for option in ({"estimator": "rotation"}, {"kl_to_base": 1.0}, {"ramp_steps": 4}):
        with pytest.raises(TrainingError, match="belongs to another run"):
            trainer_of(with_books(TRAINED[0]), tmp_path, CodebookTrainingConfig(**PLAIN, **option), max_steps=3).train(
                resume_from_checkpoint=True
            )
    assert trainer_of(with_books(TRAINED[0]), tmp_path, config, max_steps=3).train(resume_from_checkpoint=True).global_step == 3
