"""The recipe, the loss and the parameter groups."""

import dataclasses
import math

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import ConfigError, TrainingError
from tl_codebook.training import CodebookTrainingConfig, codebook_loss, collate, parameter_groups
from tl_codebook.training.losses import LanguageModel
from tl_codebook.training.teacher import BaseTeacher

BAD = [
    ("codes_learning_rate", -1.0),
    ("codes_learning_rate", math.nan),
    ("codes_learning_rate", math.inf),
    ("codes_learning_rate", "1e-3"),
    ("reconstruction", -0.1),
    ("commitment", True),
    ("init_tokens", 0),
    ("init_tokens", 10.0),
    ("init_iterations", 0),
    ("revive_every", -1),
    ("revive_every", True),
    ("revive_until", 1.1),
    ("revive_until", -0.1),
    ("revive_until", math.nan),
    ("init", "zeros"),
    ("commitment_over_positions", "max"),
    ("k_start", 0),
    ("k_start", 2.0),
    ("k_decay_steps", 0),
    ("k_decay_steps", True),
    ("k_decay_power", 0.0),
    ("k_decay_power", math.nan),
    ("estimator", "gumbel"),
    ("estimator", None),
    ("kl_steps", -1),
    ("kl_steps", 2.5),
    ("kl_steps", 10),  # and nothing that could fall
    ("kl_to_base", -1.0),
    ("kl_to_base", math.nan),
    ("kl_to_base", math.inf),
    ("kl_to_base", True),
    ("kl_to_base", "1"),
    ("ramp_steps", -1),
    ("ramp_steps", 2.0),
    ("ramp_steps", True),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        CodebookTrainingConfig(**{name: value})


@pytest.mark.parametrize("name", ["freeze_base", "per_dimension", "lm_gradient_to_codes", "log_sites"])
@pytest.mark.usefixtures("unchecked")
def test_switches_are_true_or_false(name):
    """A YAML file's "no" is a string, and every string is true."""
    with pytest.raises(ConfigError, match=name):
        CodebookTrainingConfig(**{name: "no"})


def test_defaults_and_paper():
    default, paper = CodebookTrainingConfig(), CodebookTrainingConfig.paper(codes_learning_rate=0.5)
    assert (default.init, default.commitment, default.per_dimension, default.revive_every) == ("kmeans", 1.0, True, 50)
    assert (paper.init, paper.commitment, paper.per_dimension, paper.revive_every) == ("none", 0.0, False, 0)
    assert paper.reconstruction == 1.0
    assert paper.codes_learning_rate == 0.5
    assert CodebookTrainingConfig(**default.to_dict()) == default
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.init = "none"


def test_the_paper_is_a_loss_of_the_original():
    assert CodebookTrainingConfig.paper() == CodebookTrainingConfig.original("aeloss")


LOSSES = {  # weights of reconstruction and commitment, and whether the language model moves the codes
    "base": (0.0, 0.0, True),
    "aeloss": (1.0, 0.0, True),
    "fullaeloss": (1.0, 0.25, True),
    "fullaeloss-0": (1.0, 0.0, True),
    "fullaeloss-1e-3": (1.0, 1e-3, True),
    "vqvae": (1.0, 0.25, False),
    "vqvae-.5": (1.0, 0.5, False),
    "vqvae-2.": (1.0, 2.0, False),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_the_original(loss):
    config = CodebookTrainingConfig.original(loss, codes_learning_rate=0.5)
    assert (config.reconstruction, config.commitment, config.lm_gradient_to_codes) == LOSSES[loss]
    assert (config.commitment_over_positions, config.per_dimension, config.init, config.codes_learning_rate) == ("sum", False, "none", 0.5)


@pytest.mark.parametrize(
    "loss", ["", "mse", "Base", "fullaeloss-", "vqvae--1", "vqvae-nan", "vqvae-inf", "vqvae-0.5-1", "aeloss-0.3", "base-", "vqvae "]
)
def test_losses_that_the_original_has_not(loss):
    with pytest.raises(ConfigError, match=r"is none of the original's\. Give 'base', 'aeloss', 'vqvae' or 'fullaeloss'"):
        CodebookTrainingConfig.original(loss)


def test_a_weight_too_large_to_be_a_number():
    with pytest.raises(ConfigError, match="commitment=inf"):
        CodebookTrainingConfig.original("vqvae-1e999")


# --- the codebooks' terms ---


def book_with_terms(d_in, error):
    """A codebook whose only code is `error` away from its input in every dimension."""
    book = Codebook(d_in, CodebookConfig(1)).train()
    with torch.no_grad():
        book.codes.fill_(error)
    book(torch.zeros(3, d_in, requires_grad=True))
    return book


@pytest.mark.parametrize(("per_dimension", "expected"), [(False, 4 * 4 * 1.5 + 8 * 9 * 1.5), (True, 4 * 1.5 + 9 * 1.5)])
def test_codebook_loss_by_hand(per_dimension, expected):
    books = [book_with_terms(4, 2.0), book_with_terms(8, 3.0)]
    config = CodebookTrainingConfig(reconstruction=1.0, commitment=0.5, per_dimension=per_dimension)
    assert codebook_loss(books, config).item() == pytest.approx(expected)
    only = CodebookTrainingConfig(reconstruction=0.0, commitment=0.5, per_dimension=per_dimension)
    assert codebook_loss(books, only).item() == pytest.approx(expected / 3)


@pytest.mark.parametrize("masked", [False, True])
def test_a_commitment_summed_over_positions(masked):
    book = book_with_terms(4, 2.0)
    if masked:
        book.token_mask = torch.tensor([True, False, True])
        book(torch.zeros(3, 4, requires_grad=True))
    config = CodebookTrainingConfig(reconstruction=1.0, commitment=0.5, per_dimension=False, commitment_over_positions="sum")
    assert codebook_loss([book], config).item() == pytest.approx(4 * 4 + 0.5 * (2 if masked else 3) * 4 * 4)


def test_codebook_loss_without_terms():
    book = book_with_terms(4, 2.0).eval()
    book.label = "blocks.0.hook_mlp_out"
    book(torch.zeros(3, 4))
    with pytest.raises(TrainingError, match=r"^blocks\.0\.hook_mlp_out has no loss terms.*use_reentrant=False"):
        codebook_loss([book], CodebookTrainingConfig())
    assert codebook_loss([], CodebookTrainingConfig()).item() == 0


# --- the whole ---

ROWS = [{"input_ids": torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist()} for n in (12, 5, 9, 12, 2, 7, 12, 3)]
EQUAL = [{"input_ids": torch.randint(3, 61, (10,), generator=torch.Generator().manual_seed(n)).tolist()} for n in range(8)]


@pytest.fixture(params=["bridge-gpt2", "native"])
def model(request):
    model = make_host(request.param)
    torch.manual_seed(0)
    tlc.attach(model, ["z", "mlp_out"], n_codes=8, k=2)
    return model


def by_hand(model, rows):
    """The sum of -log p and the number of tokens predicted, row by row and so without padding."""
    total, count, right = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids)[0, :-1].double().log_softmax(-1)
        total -= float(log_probs.gather(-1, ids[0, 1:, None]).sum())
        right += int((log_probs.argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    return total, count, right


def test_the_loss_is_the_cross_entropy(model):
    total, count, right = by_hand(model, ROWS)
    out = LanguageModel(model, CodebookTrainingConfig()).eval()(**collate(ROWS))
    assert out["loss"].item() == pytest.approx(total / count, rel=1e-5)
    assert out["sums"].shape == (8, 3)
    assert out["sums"].sum(0).tolist() == pytest.approx([total, count, right], rel=1e-5)
    assert out["logits"].shape == (8, 12, 61)


def test_in_training_the_terms_of_the_codebooks_are_part_of_it(model):
    config = CodebookTrainingConfig(reconstruction=2.0, commitment=0.5)
    total, count, _ = by_hand(model, ROWS)
    loss = LanguageModel(model, config).train()(**collate(ROWS))["loss"]
    books = [point.codebook for point in tlc.sites(model).values()]
    extra = sum((2.0 * book.terms.reconstruction + 0.5 * book.terms.commitment).item() / book.d_in for book in books)
    assert extra > 0.01
    assert loss.item() == pytest.approx(total / count + extra, rel=1e-5)


def test_the_number_of_items_scales_the_loss(model):
    batch = collate(ROWS)
    _, count, _ = by_hand(model, ROWS)
    wrapped = LanguageModel(model, CodebookTrainingConfig()).train()
    whole = wrapped(**batch)["loss"].item()
    assert wrapped(**batch, num_items_in_batch=count)["loss"].item() == pytest.approx(whole, rel=1e-6)
    assert wrapped(**batch, num_items_in_batch=torch.tensor(4 * count))["loss"].item() == pytest.approx(whole / 4, rel=1e-6)


def test_a_batch_in_two_parts_is_the_batch(model):
    wrapped = LanguageModel(model, CodebookTrainingConfig()).train()
    items = sum(len(row["input_ids"]) - 1 for row in EQUAL)

    def gradients(parts):
        model.zero_grad()
        total = 0.0
        for rows in parts:
            loss = wrapped(**collate(rows), num_items_in_batch=items)["loss"]
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, expected = gradients([EQUAL])
    parts, got = gradients([EQUAL[:4], EQUAL[4:]])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


# --- the divergence from the base ---

KL = CodebookTrainingConfig(kl_to_base=3.0)


def with_teacher(model, config=KL):
    """A language model whose base has moved since its teacher was made, in training mode, and the teacher."""
    wrapped = LanguageModel(model, config).train()
    wrapped.teacher = BaseTeacher(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return wrapped


def kl_by_hand(base, model, rows):
    """The sum of KL(base || model) over the tokens predicted, row by row, of what two functions make of tokens."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (function(ids)[0, :-1].double().log_softmax(-1) for function in (base, model))
        total += float((p.exp() * (p - q)).sum())
    return total


def test_the_divergence_by_hand(model):
    with tlc.bypassed(model):
        before = [model(torch.tensor([row["input_ids"]])).detach() for row in ROWS]
    wrapped = with_teacher(model)
    logits = {tuple(row["input_ids"]): value for row, value in zip(ROWS, before, strict=True)}
    kl = kl_by_hand(lambda ids: logits[tuple(ids[0].tolist())], model.eval(), ROWS)
    _, count, _ = by_hand(model, ROWS)
    batch = collate(ROWS)
    with_kl = wrapped.train()(**batch)["loss"].item()
    in_parts = wrapped(**batch, num_items_in_batch=torch.tensor(4 * count))["loss"].item()
    without = LanguageModel(model, CodebookTrainingConfig()).train()(**batch)["loss"].item()
    assert kl / count > 0.1
    assert with_kl - without == pytest.approx(3.0 * kl / count, rel=1e-4)
    assert in_parts == pytest.approx(with_kl / 4, rel=1e-6)


def test_no_divergence_without_codebooks_and_movement(model):
    wrapped, plain = LanguageModel(model, KL).train(), LanguageModel(model, CodebookTrainingConfig()).train()
    wrapped.teacher = BaseTeacher(model)
    with tlc.bypassed(model):
        assert wrapped(**collate(ROWS))["loss"].item() == pytest.approx(plain(**collate(ROWS))["loss"].item(), abs=1e-6)
    assert wrapped(**collate(ROWS))["loss"].item() > plain(**collate(ROWS))["loss"].item() + 0.1


def test_the_divergence_moves_the_model_alone(model):
    """Its gradient is that of a cross entropy whose targets, the base's probabilities, are constants."""
    wrapped, batch = with_teacher(model), collate(ROWS)
    base = wrapped.teacher.logits(batch["input_ids"])
    assert not base.requires_grad
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(wrapped(**batch)["loss"], parameters, allow_unused=True)
    out = LanguageModel(model, CodebookTrainingConfig()).train()(**batch)
    valid = batch["labels"][:, 1:] != -100
    cross = -(base.softmax(-1) * out["logits"].log_softmax(-1))[:, :-1][valid].sum() / valid.sum()
    wanted = torch.autograd.grad(out["loss"] + 3.0 * cross, parameters, allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


def test_an_evaluation_knows_no_divergence(model):
    wrapped, plain = with_teacher(model).eval(), LanguageModel(model, CodebookTrainingConfig()).eval()
    assert wrapped(**collate(ROWS))["loss"] == plain(**collate(ROWS))["loss"]


def test_a_divergence_from_no_base_is_refused(model):
    with pytest.raises(TrainingError, match=r"kl_to_base=3\.0 was asked for, and there is no base to compare with"):
        LanguageModel(model, KL).train()(**collate(ROWS))


def test_padding_counts_nothing(model):
    wrapped = LanguageModel(model, CodebookTrainingConfig()).train()
    wrapped(**collate(ROWS))
    for point in tlc.sites(model).values():
        assert int(point.codebook.usage.n_vectors) == sum(len(row["input_ids"]) for row in ROWS)
        assert point.codebook.token_mask is None


def test_without_labels_there_are_logits_alone(model):
    assert list(LanguageModel(model, CodebookTrainingConfig()).eval()(collate(ROWS)["input_ids"])) == ["logits"]


def test_parameter_groups(model):
    next(p for name, p in model.named_parameters() if ".codebook." not in name).requires_grad_(False)
    own, base = parameter_groups(model, codes_learning_rate=0.1, learning_rate=0.2, weight_decay=0.3)
    books = [p for point in tlc.sites(model).values() for p in point.codebook.parameters()]
    assert [id(p) for p in own["params"]] == [id(p) for p in books]
    assert (own["lr"], own["weight_decay"], base["lr"], base["weight_decay"]) == (0.1, 0.0, 0.2, 0.3)
    everything = [id(p) for p in own["params"] + base["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(p) for p in model.parameters() if p.requires_grad}
    for p in base["params"]:
        p.requires_grad_(False)
    assert len(parameter_groups(model, codes_learning_rate=0.1, learning_rate=0.2)) == 1
