"""All figures at once: perfect where the model is the machine by hand, and far from it where the model is random."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.experiments.neox import model_by_hand, random_model
from tests.tiny import HOSTS
from tl_codebook import sites
from tl_codebook.experiments.tokfsm.evaluation import collect_at, evaluate_base, evaluate_codes
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting


def setting(**changes) -> TokFSMSetting:
    """A machine of six states of one digit, and a model of one block."""
    sizes = dict(n_states=6, n_edges=2, n_tokens=20, n_layers=1, z_codes=(12,), mlp_codes=(11,), held_out_rows=60, sampled_rows=40)
    return TokFSMSetting.mini(**sizes | dict(forced_prefixes=2, dictionary_steps=20) | changes)


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


def test_a_model_that_is_the_machine_is_perfect_in_every_figure(host):
    model = model_by_hand(setting().machine(), host)
    figures = evaluate_codes(model, setting(), progress=False)
    assert figures["excess"] == pytest.approx(0, abs=1e-5)
    assert figures["valid_transitions"] == figures["first_valid"] == 1
    assert figures["first_successors"] == figures["first_successors_exact"] == 1
    for floor in ("recall > 1 %", "recall >= 95 %"):
        assert figures["state_codes"][floor] == {"precision": 1, "recall": 1, "covered": 1}
        assert figures["state_codes"]["sites"]["L0.mlp_out"][floor] == {"precision": 1, "recall": 1, "covered": 1}
    assert set(figures["state_codes"]["sites"]) == {"L0.z", "L0.mlp_out"}
    assert figures["decode"] == {"L0.mlp_out": {"accuracy": 1, "codes_per_state": 1}}
    assert figures["purity"]["L0.mlp_out"]["bigram"] == {"codes": 1, "inputs": 1, "n_codes": 6, "n_inputs": 6}
    assert (figures["automaton"]["f1"], figures["automaton"]["site"], figures["best_site"]) == (1, "L0.mlp_out", "L0.mlp_out")
    assert figures["automaton"]["min_share"] == pytest.approx(0.2 / 2)
    assert figures["forcing"]["all MLP"]["normalised_machine"] == pytest.approx(0, abs=1e-4)
    assert figures["forcing"]["all MLP"]["successor_exact"] == 1
    assert figures["forcing"]["all MLP, wrong"]["normalised_machine"] > 0.3
    assert figures["dead"]["sites"]["L0.mlp_out"]["attainable"] == [7]  # the digits of six states, and BOS
    assert figures["dead"]["sites"]["L0.mlp_out"]["used"] == [7]
    story = figures["demonstration"]
    assert [i for i, p in enumerate(story["before"]) if p > 0.1] == story["successors_of_state"]
    assert [i for i, p in enumerate(story["after"]) if p > 0.1] == story["successors_of_forced"]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_random_model_is_far_from_it(host):
    sizes = setting(n_layers=2, z_codes=(12, 12), mlp_codes=(12, 12))
    figures = evaluate_codes(random_model(sizes.machine(), host), sizes, progress=False)
    assert figures["excess"] > 0.3
    assert figures["valid_transitions"] < 0.6
    assert figures["automaton"]["f1"] < 1
    assert set(figures["decode"]) == {"L0.mlp_out", "L1.mlp_out"}
    assert {name: len(site["used"]) for name, site in figures["dead"]["sites"].items()} == {
        "L0.z": 2,
        "L0.mlp_out": 1,
        "L1.z": 2,
        "L1.mlp_out": 1,
    }


def test_a_model_without_codes_and_the_same_with_codes_set_aside(host):
    model = random_model(setting().machine(), host, attached=False)
    figures = evaluate_base(model, setting())
    assert figures["loss"] - figures["bayes_loss"] == pytest.approx(figures["excess"])
    assert (figures["n_sequences"], figures["held_out_rows"]) == (40, 60)
    assert figures["n_transitions"] == 40 * 18  # 19 states in a row, of one digit each


def test_the_neurons_are_those_of_the_base_where_it_is_given(host):
    sizes = setting()
    model, base = model_by_hand(sizes.machine(), host), random_model(sizes.machine(), host, attached=False, n_layers=1)
    with torch.no_grad():
        base.W_E[1:-1] = base.W_E[1].clone()  # neurons that tell state 0 from the others, and no more
    own = evaluate_codes(model, sizes, progress=False)["state_codes"]["controls"]
    of_base = evaluate_codes(model, sizes, base=base, progress=False)["state_codes"]["controls"]
    assert own["neurons"] == of_base["neurons"] == 32 + 64
    assert own["best neuron, recall > 1 %"]["precision"] == 1
    assert of_base["best neuron, recall > 1 %"]["precision"] < 0.5


def test_several_codes_at_a_time(host):
    import tl_codebook as tlc

    sizes = setting(k=2, mlp_codes=(8,))
    model = random_model(sizes.machine(), host, attached=False, n_layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tlc.attach(model, sizes.codebooks())
    figures = evaluate_codes(model, sizes, progress=False)
    assert figures["decode"]["L0.mlp_out"]["codes_per_state"] >= 1  # by the first code of two
    assert 0 <= figures["dead"]["share"] <= 1
    assert 0 <= figures["automaton"]["f1"] <= 1


def test_a_surplus_of_codes_in_use_makes_up_for_no_dead_ones():
    from tl_codebook.experiments.tokfsm.evaluation import _dead
    from tl_codebook.experiments.tokfsm.inputs import DeadCodes

    def site(used, attainable):
        one = torch.tensor([1.0])
        return DeadCodes(torch.tensor([used]), torch.tensor([attainable]), one, one)

    figures = _dead({"blocks.0.hook_mlp_out": site(16, 6), "blocks.1.hook_mlp_out": site(6, 16)})  # k > 1: two codes an input
    assert (figures["used"], figures["attainable"]) == (12, 22)
    assert figures["share"] == pytest.approx(10 / 22)


def test_the_site_of_the_automaton_is_chosen_on_the_other_half():
    from tl_codebook.experiments.tokfsm.evaluation import _decode

    labels = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    early = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 0]])[..., None]  # right on the first half alone
    late = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1]])[..., None]
    names = ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    figures, best = _decode(dict(zip(names, (early, late), strict=True)), labels, 2, dict.fromkeys(names, 2), 2)
    assert best == names[0]
    assert figures["L0.mlp_out"]["accuracy"] == 0.5


def test_values_are_collected_under_the_keys_asked_for(host):
    model = random_model(setting().machine(), host)
    name = next(iter(sites(model)))
    tokens = torch.tensor([[10, 1, 2], [10, 3, 4], [10, 5, 0]])
    found = collect_at(model, tokens, {"ids": f"{name}.hook_codes", "in": "blocks.0.hook_resid_pre"}, batch_size=2)
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(found["ids"], cache[f"{name}.hook_codes"])
    torch.testing.assert_close(found["in"], cache["blocks.0.hook_resid_pre"])
    assert not math.isnan(float(found["in"].sum()))
