"""What a model writes and expects: against the machine, by brute force, on every host."""

import itertools
import math

import pytest
import torch

import tl_codebook as tlc
from tests.experiments.neox import model_by_hand, random_model
from tests.tiny import HOSTS, make_host
from tl_codebook.errors import ConfigError, DataError, ShapeError, UnknownHookError
from tl_codebook.experiments.tokfsm import (
    TokFSM,
    bayes_predictions,
    make_tokenizer,
    read_states,
    successor_match,
    transition_validity,
    write_tokens,
)
from tl_codebook.experiments.tokfsm.model import make_model
from tl_codebook.experiments.tokfsm.setting import ARCHITECTURES, TokFSMSetting
from tl_codebook.experiments.tokfsm.text_of_model import first_transitions, loss_over_bayes, next_state_probabilities, sample_text

SINGLE = TokFSM(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool), base=4)
"""States of one digit."""
TRIPLE = TokFSM.random(6, 2, seed=0, base=2)
"""States 000 to 101: 110 and 111 are none."""


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


class Bayes(torch.nn.Module):
    """A model that predicts exactly what the best predictor does."""

    def __init__(self, machine):
        super().__init__()
        self.machine = machine

    def forward(self, tokens):
        return bayes_predictions(self.machine, tokens).clamp(min=1e-30).log().float()


def text(machine, n_rows, n_tokens, seed=0):
    return write_tokens(machine, machine.sample(n_rows, n_tokens // machine.n_digits, torch.Generator().manual_seed(seed)))


def test_a_model_that_is_the_machine_writes_its_text(host):
    model = model_by_hand(SINGLE, host)
    tokens = sample_text(model, SINGLE, 400, 12, seed=1)
    assert tokens.shape == (400, 12)  # BOS and eleven states
    states = read_states(SINGLE, tokens)
    assert transition_validity(SINGLE, states).share == 1
    assert torch.bincount(states[:, 0], minlength=4).tolist() == pytest.approx([100] * 4, abs=4 * 75**0.5)
    pairs = torch.bincount((states[:, :-1] * 4 + states[:, 1:]).flatten(), minlength=16).unflatten(0, (4, 4))
    shares = pairs / pairs.sum(1, keepdim=True)
    assert shares.tolist() == [pytest.approx(row, abs=0.08) for row in SINGLE.transition.tolist()]
    figures = loss_over_bayes(model, SINGLE, tokens)
    assert figures.excess == pytest.approx(0, abs=1e-5)
    assert successor_match(SINGLE, first_transitions(model, SINGLE)).tolist() == [1] * 4


def test_the_same_text_for_the_same_seed_and_the_generators_as_they_were(host):
    model = random_model(TRIPLE, host)
    model.train()
    before = torch.get_rng_state()
    first = sample_text(model, TRIPLE, 7, 18, batch_size=3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(sample_text(model, TRIPLE, 7, 18, batch_size=3, seed=5), first)
    assert not torch.equal(sample_text(model, TRIPLE, 7, 18, batch_size=3, seed=6), first)
    assert not torch.equal(first[:3], first[3:6])  # batches are not copies
    assert all(module.training for module in model.modules())
    assert first.shape == (7, 16)
    assert bool((first[:, 0] == TRIPLE.bos).all())


def test_a_bos_that_the_model_writes_ends_nothing(host):
    model = random_model(TRIPLE, host)
    tokens = sample_text(model, TRIPLE, 40, 24, seed=0)
    row, place = (tokens[:, 1:-1] == TRIPLE.bos).nonzero()[0].tolist()
    after = tokens[(tokens[:, 1:-1] == TRIPLE.bos).any(1), -1]
    assert read_states(TRIPLE, tokens)[row, place // 3] == -1
    assert bool((after != TRIPLE.bos).any())  # nor is it padding from there on


def test_every_host_writes_the_same_text_with_a_tokenizer_and_without():
    texts = [
        sample_text(random_model(TRIPLE, host, attached=False, tokenizer=tokenizer), TRIPLE, 20, 24, seed=2)
        for host in HOSTS
        for tokenizer in (None, make_tokenizer(TRIPLE))  # which pads with BOS
    ]
    assert all(torch.equal(one, texts[0]) for one in texts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_what_was_predicted(host, architecture):
    """The most probable text of the model is found again, whatever the tokenizer takes for padding and however positions are told."""
    setting = TokFSMSetting.mini(architecture=architecture)
    machine, model = setting.machine(), make_model(setting, 0, host)
    tokenizer = model.tokenizer
    sharp = 1e4
    head = model.unembed.W_U if hasattr(model.unembed, "W_U") else model.unembed.weight
    head.data.mul_(sharp)
    tokens = sample_text(model, machine, 2, setting.n_tokens, seed=2)
    assert tokens.shape == (2, 127)
    assert torch.equal(model(tokens)[:, :-1].argmax(-1), tokens[:, 1:])
    assert model.tokenizer is tokenizer


def test_the_best_predictor_loses_nothing():
    for machine, n_tokens in ((SINGLE, 10), (TRIPLE, 18)):
        tokens = text(machine, 30, n_tokens)
        figures = loss_over_bayes(Bayes(machine), machine, tokens, batch_size=7)
        assert figures.excess == pytest.approx(0, abs=1e-6)
        assert figures.accuracy == pytest.approx(figures.bayes_accuracy)
        assert figures == pytest.approx(loss_over_bayes(Bayes(machine), machine, tokens, batch_size=100))


def test_figures_by_hand():
    tokens = torch.tensor([[4, 0, 1, 3], [4, 2, 0, 1]])
    log2, log4 = math.log(2), math.log(4)
    figures = loss_over_bayes(lambda rows: torch.zeros(*rows.shape, 5), SINGLE, tokens)
    assert figures == pytest.approx((math.log(5), 0.2, (log4 + 2 * log2) / 3, (1 / 4 + 2 / 2) / 3, math.log(5) - (log4 + 2 * log2) / 3))

    def always_one(rows):
        return torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0]).expand(*rows.shape, 5)

    assert loss_over_bayes(always_one, SINGLE, tokens).accuracy == pytest.approx(2 / 6)


def test_figures_of_a_host(host):
    model, tokens = random_model(TRIPLE, host), text(TRIPLE, 9, 18)
    figures = loss_over_bayes(model, TRIPLE, tokens, batch_size=4)
    logits = model(tokens)[:, :-1].detach()
    assert figures.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())), rel=1e-5)
    assert figures.accuracy == pytest.approx(float((logits.argmax(-1) == tokens[:, 1:]).double().mean()))
    assert figures.excess == figures.loss - figures.bayes_loss > 0


@pytest.mark.parametrize("n_states", [6, 4, 8, 3])
def test_next_states_against_every_state_one_by_one(host, n_states):
    machine = TokFSM.random(n_states, 2, seed=0, base=2, n_digits=3)
    model = random_model(machine, host)
    prefixes = text(machine, 3, 9)[:, :7]
    got = next_state_probabilities(model, machine, prefixes, batch_size=5)
    assert got.shape == (3, n_states)
    for row, state in itertools.product(range(3), range(n_states)):
        digits = torch.tensor([state // 4, state // 2 % 2, state % 2])
        said = model(torch.cat([prefixes[row], digits])[None])[0, -4:-1].detach().log_softmax(-1)
        assert float(got[row, state]) == pytest.approx(float(said.gather(1, digits[:, None]).sum().exp()), rel=1e-4)


def test_first_transitions_are_those_after_bos_and_each_state(host):
    model = random_model(TRIPLE, host)
    rows = torch.tensor([[2, *(state // 4, state // 2 % 2, state % 2)] for state in range(6)])
    assert torch.allclose(first_transitions(model, TRIPLE, batch_size=4), next_state_probabilities(model, TRIPLE, rows), rtol=1e-4)


def test_hooks_that_differ_from_row_to_row(host):
    model, asked = random_model(TRIPLE, host), []
    prefixes = text(TRIPLE, 3, 9)[:, :7]

    def hooks(rows):
        asked.append(rows.tolist())
        return [tlc.patch_codes(rows[:, None, None], "L0.mlp_out", pos=6, source_pos=0)]

    got = next_state_probabilities(model, TRIPLE, prefixes, fwd_hooks=hooks, batch_size=4)
    assert asked == [[0, 1, 2], [0, 0, 1, 1], [2, 2], [0, 0, 0, 1], [1, 1, 2, 2], [2]]  # 110 and 111 are not begun
    for row in range(3):
        hook = tlc.force_code(f"L0.mlp_out:{row}", pos=6)
        alone = next_state_probabilities(model, TRIPLE, prefixes[row : row + 1], fwd_hooks=[hook])
        assert torch.allclose(got[row : row + 1], alone, rtol=1e-4)
    assert not torch.allclose(got, next_state_probabilities(model, TRIPLE, prefixes), rtol=1e-3)


def test_bad_samples(host):
    model = random_model(TRIPLE, host, n_ctx=16)
    for arguments, message in [
        ((0, 9), r"n_sequences=0 was asked for, but nothing would be sampled\. Give 1 or more"),
        ((1, 8), r"rows of 8 tokens were asked for"),
        ((1, 3), r"no room for BOS and the 3 digits of a state\. Give 6 or more"),
        ((1, 21), r"rows of 19 tokens were asked for, but the model takes 16\. Give shorter rows"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sample_text(model, TRIPLE, *arguments, seed=0)
    with pytest.raises(ConfigError, match=r"batch_size=0 was asked for"):
        sample_text(model, TRIPLE, 1, 9, batch_size=0, seed=0)
    with pytest.raises(ConfigError, match=r"a model of 61 tokens was given, but the machine writes 3"):
        sample_text(make_host("native"), TRIPLE, 1, 9, seed=0)


def test_bad_rows(host):
    model = random_model(TRIPLE, host, n_ctx=16)
    for rows, message in [
        ([[2, 0, 0]], r"1 rows of 2 tokens after BOS were given, but a state is 3 digits .* ends in a complete state"),
        ([[2]], r"1 rows of 0 tokens after BOS"),
        ([[2, 1, 1, 1]], r"row 0 ends in digits of no state of the machine \(6 states\)"),
        ([[0, 1, 0, 1]], r"does not begin with BOS"),
    ]:
        with pytest.raises(DataError, match=message):
            next_state_probabilities(model, TRIPLE, torch.tensor(rows))
    with pytest.raises(ConfigError, match=r"rows of 18 tokens were asked for, but the model takes 16"):
        next_state_probabilities(model, TRIPLE, text(TRIPLE, 1, 18)[:, :16])
    for hook in (tlc.force_code("L9.mlp_out:0"), ("blocks.9.hook_mlp_out", lambda x, hook: x)):
        with pytest.raises(UnknownHookError, match=r"no hook point 'blocks\.9\.hook_mlp_out"):
            next_state_probabilities(model, TRIPLE, torch.tensor([[2, 0, 0, 0]]), fwd_hooks=[hook])


def test_bad_text_to_measure_on():
    def uniform(rows):
        return torch.zeros(*rows.shape, 5)

    with pytest.raises(DataError, match=r"of which none is predicted"):
        loss_over_bayes(uniform, SINGLE, torch.tensor([[4]]))
    with pytest.raises(DataError, match=r"token 0 at position 2 of row 1 cannot come there"):
        loss_over_bayes(uniform, SINGLE, torch.tensor([[4, 0, 1], [4, 0, 0]]), batch_size=1)
    with pytest.raises(ShapeError, match=r"the model gave \[1, 3, 6\] for \[1, 3\] tokens"):
        loss_over_bayes(lambda rows: torch.zeros(*rows.shape, 6), SINGLE, torch.tensor([[4, 0, 1]]))
