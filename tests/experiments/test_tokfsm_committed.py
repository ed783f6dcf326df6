"""The committed model of the paper's machine: it is what its figures say, and no larger than a demo may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import HOSTS
from tl_codebook.experiments import tokfsm

pytestmark = pytest.mark.skipif("hooked" not in HOSTS, reason="it was saved from a HookedTransformer, which TransformerLens 4 has not")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "demos" / "tokfsm"
RESULTS = json.loads((FOLDER / "results.json").read_text())
SETTING = tokfsm.TokFSMSetting.from_dict(RESULTS["setting"])
MACHINE = SETTING.machine()


@pytest.fixture(scope="module")
def model():
    return tlc.load(FOLDER / "model").to(torch.float32)


def test_it_is_the_measured_run_of_the_preset():
    measured = json.loads((ROOT / "tests" / "benchmarks" / "results" / f"tokfsm_paper_seed{RESULTS['seed']}.json").read_text())
    assert {name: value for name, value in RESULTS.items() if name != "rounded"} == measured
    assert json.loads(json.dumps(tokfsm.TokFSMSetting.paper().to_dict())) == measured["setting"]
    assert sum(path.stat().st_size for path in (FOLDER / "model").iterdir()) <= 4 * 2**20


def test_a_codebook_at_every_head_and_mlp_with_one_code_at_a_time(model):
    points = tlc.sites(model)
    assert len(points) == 2 * SETTING.n_layers
    assert {point.codebook.k for point in points.values()} == {1}
    assert max(point.codebook.n_codes for point in points.values()) <= 1024


def test_half_precision_lost_nothing(model):
    rows = tokfsm.held_out_rows(SETTING, seed=RESULTS["seed"])[:60]
    now = tokfsm.loss_over_bayes(model, MACHINE, rows)
    assert now.excess == pytest.approx(RESULTS["codes"]["excess"], abs=2e-3)
    for name in ("excess", "valid_transitions"):
        assert RESULTS["rounded"][name] == pytest.approx(RESULTS["codes"][name], abs=5e-3)


def test_its_text_is_the_machines(model):
    text = tokfsm.sample_text(model, MACHINE, 40, SETTING.n_tokens, seed=1)
    share = tokfsm.transition_validity(MACHINE, tokfsm.read_states(MACHINE, text)).share
    assert share == pytest.approx(RESULTS["codes"]["valid_transitions"], abs=0.03)


def test_forced_codes_are_the_state(model):
    """The codes of a state, forced at the MLPs after another one, bring the next digit that the machine has after the state."""
    codes = tokfsm.state_codes(model, MACHINE, tokfsm.held_out_rows(SETTING, seed=RESULTS["seed"]))
    mlp = [name for name in tlc.sites(model) if name.endswith("mlp_out")]
    targets = torch.arange(0, 100, 10)
    prefixes = tokfsm.write_tokens(MACHINE, MACHINE.sample(10, 30, torch.Generator().manual_seed(3)), keep_last=True)
    truth = tokfsm.bayes_predictions(MACHINE, tokfsm.write_tokens(MACHINE, targets[:, None], keep_last=True))[:, -1]
    forced = tokfsm.force_states(model, MACHINE, codes, prefixes, targets, mlp)
    one = tokfsm.force_states(model, MACHINE, codes, prefixes, targets, "L0.mlp_out")
    assert float(tokfsm.jensen_shannon(forced, truth).mean()) < 0.01
    assert float(tokfsm.jensen_shannon(one, truth).mean()) < 0.01
