"""What an experiment may be, and what it may not: refused before anything is built."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny import HOSTS
from tl_codebook.errors import ConfigError
from tl_codebook.experiments.tokfsm import TokFSM
from tl_codebook.experiments.tokfsm.model import make_model
from tl_codebook.experiments.tokfsm.setting import ARCHITECTURES, TokFSMSetting
from tl_codebook.training.config import CodebookTrainingConfig


def test_the_paper_preset_is_the_papers_machine_and_model():
    setting = TokFSMSetting.paper()
    assert setting.machine().adjacency.equal(TokFSM.paper().adjacency)
    assert (setting.n_layers, setting.d_model, setting.n_heads, setting.n_tokens, setting.k) == (4, 128, 4, 128, 1)
    assert max(setting.z_codes + setting.mlp_codes) <= 1024
    assert setting.training_tokens <= 5e7


def test_every_site_of_every_layer_gets_a_codebook():
    books = TokFSMSetting.mini(z_codes=(8, 9), mlp_codes=(10, 11)).codebooks()
    assert {address: config.n_codes for address, config in books.items()} == {"L0.z": 8, "L0.mlp_out": 10, "L1.z": 9, "L1.mlp_out": 11}
    assert {config.similarity for config in books.values()} == {"euclidean"}


def test_the_recipe_decides_codebooks_and_stages():
    default, paper = (TokFSMSetting.mini(recipe=recipe, base_steps=30, code_steps=20) for recipe in ("default", "paper"))
    assert default.steps == {"base": 30, "codes": 20}
    assert paper.steps == {"codes": 50}
    assert default.training_tokens == paper.training_tokens == 50 * 64 * 128
    assert {(c.similarity, c.input_norm, c.reduce) for c in paper.codebooks().values()} == {("inner_product", "layer_norm", "mean")}


def test_more_than_one_code_at_a_time_is_chosen_by_pursuit():
    books = TokFSMSetting.mini(k=4).codebooks()
    assert {(config.k, config.selection, config.reduce) for config in books.values()} == {(4, "residual", "sum")}


def test_a_setting_survives_json():
    setting = TokFSMSetting.paper(training=CodebookTrainingConfig(commitment=0.25), z_codes=(1, 2, 3, 4))
    assert TokFSMSetting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting
    fields = setting.to_dict()
    with pytest.raises(ConfigError, match=r"unknown fields \['more'\] and lacks \['k'\]"):
        TokFSMSetting.from_dict({name: value for name, value in fields.items() if name != "k"} | {"more": 1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(n_edges=21), r"n_edges=21 was asked for.* Give 1 to 20"),
        (dict(n_edges=0), "n_edges=0"),
        (dict(n_states=0), "n_states=0"),
        (dict(base=1), "base=1"),
        (dict(n_tokens=127), r"rows of 127 tokens were asked for.* Give a multiple of 2"),
        (dict(n_tokens=0), "rows of 0 tokens"),
        (dict(n_tokens=4), r"n_tokens=4 was asked for, in which a model writes no two complete states after BOS. Give 6 or more"),
        (dict(d_model=65), r"d_model=65 with n_heads=2 .* Give a multiple of 4"),
        (dict(d_model=66), "d_model=66 with n_heads=2"),
        (dict(n_heads=0), "n_heads=0"),
        (dict(n_layers=3), r"z_codes=\(128, 128\) was given for 3 layers"),
        (dict(mlp_codes=(1,)), r"mlp_codes=\(1,\) was given for 2 layers"),
        (dict(mlp_codes=(16, 0)), "n_codes=0"),
        (dict(k=17), r"k=17 codes were asked for, but there are n_codes=16"),
        (dict(k=True), "k=True"),
        (dict(code_steps=0), r"code_steps=0 was asked for. Give a whole number >= 1"),
        (dict(base_steps=-1), "base_steps=-1"),
        (dict(base_steps=0), "base_steps=0 was asked for, and the recipe 'default' trains the base first"),
        (dict(n_states=1, n_edges=1), "n_states=1"),
        (dict(adam_beta2=1.0), "adam_beta2=1.0"),
        (dict(recipe="paper", similarity="inner_product"), "similarity and recipe='paper' were asked for, which has its own"),
        (dict(recipe="paper", training=CodebookTrainingConfig(commitment=0.0)), "training and recipe='paper'"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(held_out_rows=1), "held_out_rows=1"),
        (dict(architecture="gpt3"), r"architecture='gpt3' is not known. Choose one of \['gpt2', 'gpt_neox'\]"),
        (dict(recipe="papers"), r"recipe='papers' is not known. Choose one of \['default', 'paper'\]"),
        (dict(learning_rate=0.0), "learning_rate=0.0"),
        (dict(base_learning_rate=float("nan")), "base_learning_rate=nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        TokFSMSetting.mini(**changes)


def test_an_unknown_preset():
    with pytest.raises(ConfigError, match=r"the preset 'maxi' is not known. Choose 'mini' or 'paper'"):
        TokFSMSetting.preset("maxi")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("host", HOSTS)
def test_the_model_is_the_same_for_a_seed(host, architecture):
    setting = TokFSMSetting.mini(architecture=architecture)
    before = torch.get_rng_state()
    one, two, other = (make_model(setting, seed, host) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    tokens = torch.tensor([[10, 0, 4, 1, 9]])
    assert torch.equal(one(tokens), two(tokens))
    assert not torch.allclose(one(tokens), other(tokens), atol=1e-3)
    assert bool(one.cfg.parallel_attn_mlp) == (architecture == "gpt_neox")
    assert one.cfg.positional_embedding_type == {"gpt2": "standard", "gpt_neox": "rotary"}[architecture]
    assert (one.cfg.n_layers, one.cfg.d_model, one.cfg.n_heads, one.cfg.d_mlp, one.cfg.n_ctx, one.cfg.d_vocab) == (2, 64, 2, 256, 128, 11)


@pytest.mark.skipif(len(HOSTS) < 2, reason="TransformerLens has one host")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hosts_compute_the_same(architecture):
    tokens = torch.tensor([[10, 0, 4, 1, 9, 1, 0]])
    hooked, bridge = (make_model(TokFSMSetting.mini(architecture=architecture), 0, host)(tokens) for host in HOSTS)
    torch.testing.assert_close(hooked, bridge, atol=1e-5, rtol=1e-4)
