"""Codebooks in whole models against the original's hooked models: edits at `hook_codes`, options, generation.

The original raises a TypeError on ``code_pos="append"`` (``errors`` in each case.json); `force_code(slot="append")` works, so there is
nothing to compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.parity.golden import (
    SITES,
    Case,
    Hook,
    assert_floats,
    assert_ids,
    at_group,
    edit_hook,
    option_hooks,
    place_of,
    read_case,
)
from tests.tiny import HOSTS
from tl_codebook.convert.codebook_features import load_codebook_features
from tl_codebook.interventions import force_code
from tl_codebook.names import Address, codes_hook
from tl_codebook.steering import steer

GROUPED = ["neox__attn_preproj_k8", "neox__attn_preproj+mlp_k3_k2"]
CASES = ["gpt2__attn_k2", "gpt2__mlp_k5", "neo__mlp_k5", *GROUPED]
EDITS = [
    "base",
    "edit_one",
    "edit_all_pos_all_slots",
    "edit_pos_list_slot0",
    "edit_last_pos",
    "edit_many",
    "edit_same_code_every_codebook",
    "flip_batch",
    "block_slot0",
    "block_positions",
    "set_row",
    "keep_first_1",
    "identity",
    "reverse_slots",
]
OPTIONS = [
    "codes_keep_all",
    "codes_keep_tkns",
    "codes_drop_all",
    "codes_drop_tkns",
    "topk_keep_all",
    "topk_keep_tkns",
    "topk_drop_all",
    "topk_drop_tkns",
    "topk_keep_last_tkn",
    "both_keep_all",
    "both_keep_tkns",
    "both_drop_tkns",
    "sim_idx_drop",
    "all_codes_drop",
    "drop_nothing",
    "cosine",
    "layer1_topk",
    "disable_codes_method_layer0",
    "codes_drop_then_edit",
]
GROUP_OPTIONS = ["group_heads_1_2_topk"]


class Hooked(NamedTuple):
    """A case, and its model with the codebooks of the checkpoint."""

    case: Case
    model: Any
    tokens: Tensor

    @torch.no_grad()
    def run(self, hooks: list[Hook]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with self.model.hooks(fwd_hooks=hooks):
            return self.model.run_with_cache(self.tokens)

    @property
    def places(self) -> list[Address]:
        """Every group of every codebook, in the order in which they fire."""
        order = list(SITES.values())
        places = map(place_of, self.case.spec["hook_names"])
        return sorted(places, key=lambda place: (place.layer, order.index(place.site), place.group or 0))


@pytest.fixture(scope="module", params=[f"{host}-{case}" for case in CASES for host in HOSTS])
def hooked(request, shared):
    host, _, name = request.param.partition("-")
    case = read_case(shared, f"intervene/{name}")
    model, _ = load_codebook_features(case.folder / "checkpoint", shared(f"golden/bases/{case.spec['base']}"), host)
    return Hooked(case, model, case.data["input_ids"])


def options_of(steps: list[Any], places: list[Address]) -> dict[Address, dict[str, Any]]:
    """Return what the original's calls set, by place; `disable_codes` is a list of the sets of codes that were disabled in turn."""
    options: dict[Address, dict[str, Any]] = {place: {"disable_codes": []} for place in places}
    for method, given in steps:
        given = dict(given)
        if method == "layer_set_hook_kwargs":
            layers, sites, groups = [given.pop("layer")], [SITES[given.pop("site")]], given.pop("cb_idx")
            chosen = [place for place in places if place.layer in layers and place.site in sites and place.group in groups]
        else:
            layers = given.pop("idx", None)
            layers = [layers] if isinstance(layers, int) else layers
            chosen = [place for place in places if layers is None or place.layer in layers]
        codes = given.pop("codes" if method == "disable_codes" else "disable_codes", None)
        assert chosen
        for place in chosen:
            options[place] |= given
            if codes is not None:
                options[place]["disable_codes"] = [*options[place]["disable_codes"], [codes] if isinstance(codes, int) else codes]
    return options


def check_run(hooked: Hooked, name: str) -> None:
    spec = {run["name"]: run for run in hooked.case.spec["runs"]}[name]
    assert spec["ids_stable"] is True
    options = options_of(spec.get("kwargs_steps", []), hooked.places)
    hooks = option_hooks(lambda hooks: hooked.run(hooks)[1], options)
    hooks += [edit_hook(edit, hooked.tokens.shape) for edit in spec.get("edits", [])]
    logits, cache = hooked.run(hooks)
    for key in hooked.case.spec["hook_names"]:
        place, out = place_of(key), hooked.case.data.get(f"{name}/out/{key}")
        assert_ids(cache[codes_hook(place.hook_name)], hooked.case.data[f"{name}/ids/{key}"], place)
        assert (out is None) == (place.layer != 0)
        if out is not None:
            assert_floats(at_group(cache[place.hook_name], place), out, atol=1e-4)
    assert_floats(logits, hooked.case.data[f"{name}/logits"], atol=1e-4)


def test_every_run_is_here(hooked):
    assert sorted(run["name"] for run in hooked.case.spec["runs"]) == sorted(
        EDITS + OPTIONS + GROUP_OPTIONS * (hooked.places[0].group is not None)
    )


@pytest.mark.parametrize("name", EDITS)
def test_edits(hooked, name):
    check_run(hooked, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(hooked, name):
    check_run(hooked, name)


@pytest.mark.parametrize("hooked", [f"{host}-{case}" for case in GROUPED for host in HOSTS], indirect=True)
def test_options_of_single_heads(hooked):
    check_run(hooked, *GROUP_OPTIONS)


def test_codes_at_another_position_in_each_sequence(hooked):
    spec = hooked.case.spec["generate"][-1]
    assert spec["name"] == "var_pos"
    place = next(place_of(key) for key, name in hooked.case.spec["hook_names"].items() if name == spec["hook"])
    mask = torch.zeros_like(hooked.tokens, dtype=torch.bool)
    mask[range(len(spec["pos"])), spec["pos"]] = True
    hook = force_code(spec["code"], pos=mask, slot="all", layer=place.layer, site=place.site, group=place.group)
    logits, cache = hooked.run([hook])
    assert_ids(cache[codes_hook(place.hook_name)], hooked.case.data["var_pos/ids"], place)
    assert_floats(logits, hooked.case.data["var_pos/logits"], atol=1e-4)


@pytest.mark.parametrize("cached", [True, False], ids=["kv_cache", "no_cache"])
@pytest.mark.parametrize("index", range(3))
def test_generation(hooked, index, cached):
    spec = hooked.case.spec["generate"][index]
    assert spec["name"] == f"generate{index}"
    assert spec["kv_cache_equals_no_cache"] is True
    hooks = []
    for info in spec["infos"]:
        slot = "all" if info["code_pos"] is None else info["code_pos"]
        hooks.append(
            force_code(info["code"], pos=info["pos"], slot=slot, layer=info["layer"], site=SITES[info["cb_at"]], head=info["head"])
        )
    prompt, want = hooked.tokens[:, :6], hooked.case.data[f"generate{index}/tokens"]
    with steer(hooked.model, hooks), torch.no_grad():
        logits = hooked.model(prompt)
        tokens = hooked.model.generate(
            prompt, max_new_tokens=8, do_sample=False, use_past_kv_cache=cached, stop_at_eos=False, verbose=False, return_type="tokens"
        )
    assert_floats(logits, hooked.case.data[f"generate{index}/prompt_logits"], atol=1e-4)
    assert tokens.tolist() == want.tolist()
