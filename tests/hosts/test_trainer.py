"""`CodebookTrainer` on every kind of host: what it moves and leaves alone, starts, counts, evaluates and refuses."""

import math

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.hosts.training import MLP, TRAINED, arguments, assert_equal, base_weights, codes, host_of, rows, trainer_of, weights, with_books
from tests.tiny import HOSTS, make_host
from tl_codebook.errors import AttachError, CheckpointError, CheckpointExistsError, DataError, NonFiniteError, TrainingError
from tl_codebook.training import CodebookTrainer, CodebookTrainingConfig, collate

NO_START = CodebookTrainingConfig(init="none", revive_every=0)


@pytest.fixture(params=TRAINED)
def kind(request):
    return request.param


class After(TrainerCallback):
    """Call a function at the end of one step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function(kwargs["optimizer"])


# --- what moves ---


def test_the_loss_falls(kind, tmp_path):
    model = with_books(kind)
    config = CodebookTrainingConfig(codes_learning_rate=1e-2, init_iterations=2)
    settings = {"max_steps": 25, "per_device_train_batch_size": 16, "train_dataset": rows(64), "eval_dataset": rows(8, seed=2)}
    trainer = trainer_of(model, tmp_path, config, **settings)
    before = trainer.evaluate()["eval_loss"]  # of the language model alone
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # with the codebooks' terms
    assert result.global_step == len(losses) == 25
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert trainer.evaluate()["eval_loss"] < before - 0.5


def test_base_and_codes_both_move_at_their_own_rate(kind, tmp_path):
    model = with_books(kind)
    before, base = codes(model), base_weights(model)
    trainer = trainer_of(model, tmp_path, CodebookTrainingConfig(codes_learning_rate=0.01, init="none", revive_every=0), max_steps=1)
    trainer.train()
    groups = trainer.optimizer.param_groups
    own = {id(p) for point in tlc.sites(model).values() for p in point.codebook.parameters()}
    assert [group["lr"] for group in groups] == [0.01, 0.001]
    assert {id(p) for p in groups[0]["params"]} == own
    assert not own & {id(p) for p in groups[1]["params"]}
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    # The first step of Adam is as long as the learning rate wherever the gradient is not tiny.
    assert max(float((new - before[name]).abs().max()) for name, new in codes(model).items()) == pytest.approx(0.01, rel=1e-3)
    assert max(float((new - base[name]).abs().max()) for name, new in base_weights(model).items()) == pytest.approx(0.001, rel=1e-3)


def test_a_rate_of_zero_leaves_its_part_bit_for_bit(kind, tmp_path):
    model = with_books(kind)
    before, base = codes(model), base_weights(model)
    trainer_of(model, tmp_path, NO_START, learning_rate=0.0).train()
    assert_equal(base_weights(model), base)
    moved = codes(model)
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    trainer_of(model, tmp_path, CodebookTrainingConfig(codes_learning_rate=0.0, init="none", revive_every=0)).train()
    assert_equal(codes(model), moved)
    assert any(not torch.equal(value, base[name]) for name, value in base_weights(model).items())


def test_a_frozen_base_stays_bit_for_bit_and_codes_move(kind, tmp_path):
    model = with_books(kind)
    base, before, trained = base_weights(model), codes(model), [parameter.requires_grad for parameter in model.parameters()]
    trainer = trainer_of(model, tmp_path, CodebookTrainingConfig(freeze_base=True, init_iterations=2), weight_decay=0.1)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1
    assert_equal(base_weights(model), base)
    assert all(not torch.equal(value, before[name]) for name, value in codes(model).items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_what_the_user_froze_stays_frozen_and_routes_come_back(tmp_path):
    model = with_books(TRAINED[0])
    frozen = next(iter(model.blocks[0].parameters()))
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    seen = []
    watch = After(1, lambda optimizer: seen.append([point.codebook.lm_gradient_to_codes for point in tlc.sites(model).values()]))
    config = CodebookTrainingConfig(lm_gradient_to_codes=False, init="none")
    trainer_of(model, tmp_path, config, callbacks=[watch]).train()
    assert torch.equal(frozen, before)
    assert not frozen.requires_grad
    assert seen == [[False] * 4]
    assert all(point.codebook.lm_gradient_to_codes for point in tlc.sites(model).values())


def test_weight_decay_is_for_the_base_alone(tmp_path):
    trainer = trainer_of(with_books(TRAINED[0]), tmp_path, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]


# --- the start and the revival ---


def test_kmeans_starts_codebooks_that_are_noise_and_no_others(tmp_path):
    model = with_books(TRAINED[0])
    books = {name: point.codebook for name, point in tlc.sites(model).items()}
    books[MLP].fresh = False
    before, base = codes(model), base_weights(model)
    trainer_of(model, tmp_path).start_codes()
    after = codes(model)
    assert [name for name in after if torch.equal(after[name], before[name])] == [MLP]
    assert not any(book.fresh for book in books.values())
    assert_equal(base_weights(model), base)
    trainer_of(model, tmp_path).start_codes()
    assert_equal(codes(model), after)


def test_the_start_is_kmeans_on_the_activations_of_the_base(tmp_path):
    model = with_books(TRAINED[0], "mlp_out", n_codes=8, k=1)
    with tlc.bypassed(model):
        _, cache = model.run_with_cache(collate(rows())["input_ids"])
    x = cache["blocks.0.hook_mlp_out.hook_x" if "blocks.0.hook_mlp_out.hook_x" in cache else "blocks.0.hook_mlp_out"].flatten(0, 1)
    spread = (x - x.mean(0)).square().sum()
    trainer_of(model, tmp_path, CodebookTrainingConfig(init_iterations=10)).start_codes()
    distance = torch.cdist(x, codes(model)["blocks.0.hook_mlp_out"][0])
    assert distance.min(-1).values.square().sum() < 0.7 * spread


def test_no_start_where_none_is_asked_for(tmp_path):
    model = with_books(TRAINED[0])
    before = codes(model)
    trainer_of(model, tmp_path, NO_START).start_codes()
    assert_equal(codes(model), before)
    trainer_of(model, tmp_path, NO_START).train()
    assert not any(point.codebook.fresh for point in tlc.sites(model).values())  # trained codes are no noise


def test_a_code_that_no_longer_fires_is_revived_and_its_optimiser_state_forgotten(tmp_path):
    model = with_books(TRAINED[0], "mlp_out", n_codes=4, k=1)
    book = tlc.sites(model)[MLP].codebook
    lost, momentum = [], []

    def lose(optimizer):
        code = int(book.usage.counts[0].argmax())
        state = getattr(optimizer, "optimizer", optimizer).state[book.codes]
        lost.append(code)
        momentum.append(state["exp_avg"][0, code].abs().max().item())
        with torch.no_grad():
            book.codes[0, code] = 1e3

    config = CodebookTrainingConfig(init_iterations=2, revive_every=2, revive_until=1.0)
    trainer = trainer_of(model, tmp_path, config, max_steps=4, callbacks=[After(1, lose)])
    trainer.train()
    state = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    (code,) = lost
    assert momentum[0] > 0
    assert book.codes[0, code].abs().max() < 100
    assert state[book.codes]["exp_avg"][0, code].abs().max() == 0
    assert state[book.codes]["exp_avg_sq"][0, code].abs().max() == 0
    assert state[book.codes]["exp_avg_sq"][0].sum() > 0
    assert not book.keep_inputs
    assert book.last_inputs is None


@pytest.mark.parametrize(("every", "until"), [(0, 1.0), (2, 0.25)], ids=["never", "not after revive_until"])
def test_no_revival(tmp_path, every, until):
    model = with_books(TRAINED[0], "mlp_out", n_codes=4, k=1)
    book = tlc.sites(model)[MLP].codebook

    def lose(optimizer):
        with torch.no_grad():
            book.codes[0, 0] = 1e3

    config = CodebookTrainingConfig(init_iterations=2, revive_every=every, revive_until=until)
    trainer_of(model, tmp_path, config, max_steps=4, callbacks=[After(1, lose)]).train()
    assert book.codes[0, 0].min() > 900


# --- counting and evaluating ---


@pytest.mark.parametrize("accumulation", [1, 2])
def test_usage_after_one_step_counts_every_position_but_padding(kind, tmp_path, accumulation):
    model = with_books(kind)
    lengths = [12, 7, 3, 12]
    data = [{"input_ids": row["input_ids"][:n], "attention_mask": [1] * n} for row, n in zip(rows(4), lengths, strict=True)]
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer_of(model, tmp_path, train_dataset=data, max_steps=1, **settings).train()
    for point in tlc.sites(model).values():
        book = point.codebook
        assert int(book.usage.n_vectors) == sum(lengths)
        assert book.usage.counts.sum(-1).tolist() == [sum(lengths) * book.k] * book.n_groups


def test_evaluation_metrics_by_hand(kind, tmp_path):
    model = with_books(kind, n_codes=24)
    data = [
        {"input_ids": row["input_ids"][:n], "attention_mask": [1] * n} for row, n in zip(rows(5, seed=3), (12, 5, 2, 9, 12), strict=True)
    ]
    trainer = trainer_of(model, tmp_path, eval_dataset=data, per_device_eval_batch_size=2)
    trainer.start_codes()
    metrics = trainer.evaluate()
    nll, right, count, chosen, inputs, outputs = 0.0, 0, 0, {}, {}, {}
    for row in data:  # one by one, so that no padding is anywhere
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits, cache = model.run_with_cache(ids)
        log_probs = logits[0, :-1].double().log_softmax(-1)
        nll -= float(log_probs.gather(-1, ids[0, 1:, None]).sum())
        right += int((log_probs.argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
        for name, point in tlc.sites(model).items():
            groups = point.codebook.n_groups
            chosen.setdefault(name, []).append(cache[f"{name}.hook_codes"].reshape(ids.shape[1], groups, -1))
            inputs.setdefault(name, []).append(cache[f"{name}.hook_x"].reshape(ids.shape[1], groups, -1))
            outputs.setdefault(name, []).append(cache[name].reshape(ids.shape[1], groups, -1))
    dead, perplexities, unexplained = [], [], []
    for name in chosen:
        ids, x, q = torch.cat(chosen[name]), torch.cat(inputs[name]).double(), torch.cat(outputs[name]).double()
        for group in range(ids.shape[1]):
            counts = torch.bincount(ids[:, group].flatten(), minlength=24).double()
            share = counts[counts > 0] / counts.sum()
            dead += (counts == 0).tolist()
            perplexities.append(math.exp(-float((share * share.log()).sum())))
            error = (q[:, group] - x[:, group]).square().sum()
            unexplained.append(float(error / (x[:, group] - x[:, group].mean(0)).square().sum()))
    assert metrics["eval_loss"] == pytest.approx(nll / count, rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(right / count)
    assert metrics["eval_tokens"] == count == 35
    assert metrics["eval_dead_codes"] == pytest.approx(sum(dead) / len(dead))
    assert metrics["eval_code_perplexity"] == pytest.approx(sum(perplexities) / len(perplexities), rel=1e-6)
    assert metrics["eval_unexplained_variance"] == pytest.approx(sum(unexplained) / len(unexplained), rel=1e-4)


def test_figures_of_every_site_where_they_are_asked_for(kind, tmp_path):
    model = with_books(kind, n_codes=24)
    data = [{"input_ids": row["input_ids"][:n], "attention_mask": [1] * n} for row, n in zip(rows(2, seed=3), (12, 5), strict=True)]
    plain = trainer_of(model, tmp_path, NO_START, eval_dataset=data).evaluate()
    assert not any(key.startswith("eval_codes/") for key in plain)
    config = CodebookTrainingConfig(init="none", revive_every=0, log_sites=True)
    metrics = trainer_of(model, tmp_path, config, eval_dataset=data).evaluate()
    labels = {
        f"L{layer}.{site}": f"blocks.{layer}.{hook}"
        for layer in (0, 1)
        for site, hook in (("z", "attn.hook_z"), ("mlp_out", "hook_mlp_out"))
    }
    wanted = {}
    for label, name in labels.items():
        x, q, book = [], [], tlc.sites(model)[name].codebook
        for row in data:  # one by one, so that no padding is anywhere
            with torch.no_grad():
                cache = model.run_with_cache(torch.tensor([row["input_ids"]]))[1]
            x.append(cache[f"{name}.hook_x"].reshape(-1, book.n_groups, book.d_group).double())
            q.append(cache[name].reshape(-1, book.n_groups, book.d_group).double())
        x, q, norms = torch.cat(x), torch.cat(q), book.codes.detach().norm(dim=-1)
        wanted[label] = {
            "mse": float((x - q).square().sum(-1).mean()),
            "input_norm": float(x.norm(dim=-1).mean()),
            "output_norm": float(q.norm(dim=-1).mean()),
            "mean_code_norm": float(norms.mean()),
            "max_code_norm": float(norms.max()),
        }
    wanted["all"] = {key: sum(site[key] for site in wanted.values()) / 4 for key in wanted["L0.z"]}
    wanted["all"]["max_code_norm"] = max(wanted[label]["max_code_norm"] for label in labels)
    got = {key: value for key, value in metrics.items() if key.startswith("eval_codes/")}
    dead = [got.pop(f"eval_codes/{label}/dead_codes") for label in (*labels, "all")]
    assert dead[-1] == metrics["eval_dead_codes"]
    assert min(dead[:-1]) < dead[-1] < max(dead[:-1])
    flat = {f"eval_codes/{label}/{key}": value for label, figures in wanted.items() for key, value in figures.items()}
    assert got == pytest.approx(flat, rel=1e-4)


def test_figures_of_codebooks_that_are_bypassed(tmp_path):
    model = with_books(TRAINED[0])
    config = CodebookTrainingConfig(init="none", revive_every=0, log_sites=True)
    trainer = trainer_of(model, tmp_path, config, eval_dataset=rows(2))
    with tlc.bypassed(model, "blocks.0.hook_mlp_out"):
        metrics = trainer.evaluate()
    assert {key.split("/")[1] for key in metrics if key.startswith("eval_codes/")} == {"L0.z", "L1.z", "L1.mlp_out", "all"}
    with tlc.bypassed(model):
        assert not any(key.startswith("eval_codes/") for key in trainer.evaluate())


def test_evaluation_leaves_the_training_counts_alone(tmp_path):
    model = with_books(TRAINED[0])
    trainer = trainer_of(model, tmp_path, eval_dataset=rows(4), eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.train()
    book = tlc.sites(model)[MLP].codebook
    assert int(book.usage.n_vectors) == 2 * 4 * 12
    assert [entry["eval_dead_codes"] for entry in trainer.state.log_history if "eval_loss" in entry] != []
    assert book.count_when == "train"


# --- faults ---


def test_no_codebooks(kind, tmp_path):
    with pytest.raises(TrainingError, match=r"no codebooks to train\. Call attach"):
        CodebookTrainer(host_of(kind), arguments(tmp_path), rows())


def test_no_host(tmp_path):
    with pytest.raises(AttachError, match="Linear was given where a TransformerLens model is needed"):
        CodebookTrainer(torch.nn.Linear(2, 2), arguments(tmp_path), rows())


def test_an_output_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "run").write_text("a file")
    model = with_books(TRAINED[0])
    before = weights(model)
    with pytest.raises(CheckpointError, match=r"run cannot be written to .*nothing was written"):
        trainer_of(model, tmp_path / "run", save_strategy="steps")
    assert_equal(weights(model), before)
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("option", [{"fsdp": "full_shard"}, {"deepspeed": "x.json"}], ids=["fsdp", "deepspeed"])
def test_what_does_not_work_with_codebooks_is_refused(tmp_path, option):
    args = arguments(tmp_path)
    for name, value in option.items():
        setattr(args, name, value)
    with pytest.raises(TrainingError, match="Use DDP"):
        CodebookTrainer(with_books(TRAINED[0]), args, rows())


def test_an_empty_dataset(tmp_path):
    with pytest.raises(DataError, match="0 rows"):
        trainer_of(with_books(TRAINED[0]), tmp_path, train_dataset=[])


def test_a_batch_larger_than_the_data_warns_and_trains(tmp_path):
    with pytest.warns(UserWarning, match="batch of 4 rows was asked for and the data has 2"):
        trainer = trainer_of(with_books(TRAINED[0]), tmp_path, train_dataset=rows(2), max_steps=2)
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("after", [0, 2])
def test_nan_at_a_codebook_names_site_and_step(kind, tmp_path, after):
    model = with_books(kind, "mlp_out")
    trained = [parameter.requires_grad for parameter in model.parameters()]

    def poison(optimizer=None):
        with torch.no_grad():
            next(p for name, p in model.blocks[1].mlp.named_parameters() if p.ndim == 2).fill_(torch.nan)

    callbacks = [After(after, poison)] if after else []
    trainer = trainer_of(model, tmp_path, NO_START, max_steps=4, save_strategy="steps", save_steps=1, callbacks=callbacks)
    if not after:
        poison()
    with pytest.raises(NonFiniteError, match=rf"^step {after + 1}: {MLP}: .* hold NaN or Inf") as raised:
        trainer.train()
    assert ("The last checkpoint is untouched." in str(raised.value)) == bool(after)  # before the first step there is none
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_loss_that_becomes_nan_past_the_codebooks_stops_the_run_too(tmp_path):
    """The codes still see finite activations in that step, and a step later every weight would be NaN, in the checkpoint as well."""
    model = with_books(TRAINED[0])
    poison = After(2, lambda optimizer: torch.nn.init.constant_(next(iter(model.unembed.parameters())), torch.nan))
    trainer = trainer_of(
        model, tmp_path, NO_START, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=1, callbacks=[poison]
    )
    before = {}
    keep = After(1, lambda optimizer: before.update(weights(model)))
    trainer.add_callback(keep)
    with pytest.raises((NonFiniteError, TrainingError), match="step 3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in codes(model).values())


def test_trained_model_still_takes_hooks(kind, tmp_path):
    model = with_books(kind)
    trainer_of(model, tmp_path).train()
    model.eval()
    with torch.no_grad():
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[tlc.force_code("L1.mlp_out:3", slot="all")])
    assert not torch.equal(logits, model(TOKENS))


def test_gradient_checkpointing_is_for_hosts_that_have_it(tmp_path):
    model = make_host("hooked-gpt2" if "hooked" in HOSTS else "native")
    tlc.attach(model, "mlp_out", n_codes=12, k=2)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, gradient_checkpointing=True, disable_tqdm=True)
    trainer = tlc.CodebookTrainer(model, args, train_dataset=[{"input_ids": list(range(3, 15))}] * 8)
    with pytest.raises(TrainingError, match="gradient_checkpointing"):
        trainer.train()


def test_gradient_checkpointing_on_a_bridge_trains_the_same_codes(tmp_path):
    trained = []
    for on in (False, True):
        model = make_host("bridge-llama")
        torch.manual_seed(1)
        books = tlc.attach(model, "mlp_out", n_codes=12, k=2)
        args = TrainingArguments(
            str(tmp_path / str(on)),
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            gradient_checkpointing=on,
            disable_tqdm=True,
        )
        tlc.CodebookTrainer(model, args, train_dataset=[{"input_ids": list(range(3, 15))}] * 8).train()
        trained.append({name: book.codes.detach().clone() for name, book in books.items()})
        assert all(int(book.usage.counts.sum()) == 2 * 8 * 12 * 2 for book in books.values())
    for name, codes_plain in trained[0].items():
        torch.testing.assert_close(trained[1][name], codes_plain)


def test_an_output_folder_that_holds_another_model_is_refused_before_training(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointExistsError, match=r"holds the weights of a Hugging Face model \('model.safetensors'\)"):
        trainer_of(with_books(TRAINED[0]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
