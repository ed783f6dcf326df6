"""Names of codebooks and descriptions of codes, as the original writes and reads them."""

from __future__ import annotations

import json
import re

import pytest

from tests.parity.golden import place_of
from tl_codebook.convert.original_config import PLACES
from tl_codebook.describe.export import code_info, original_name, write_code_info
from tl_codebook.describe.label_files import CodeLabel, CodeLabels, read_labels
from tl_codebook.names import Address, codes_hook


@pytest.fixture(scope="module")
def expected(shared):
    return json.loads((shared("golden/utils/names") / "expected.json").read_text())


def test_names_of_codebooks(expected):
    """``convert_to_adv_name`` puts layer, place and head together, ``convert_to_base_name`` and its kin take them apart."""
    for base, place, gcb, full in expected["convert_to_adv_name"]:
        layer, head = re.fullmatch(r"layer(\d+)_head(\d+)", base).groups()
        assert gcb == "_gcb"
        assert original_name(Address(int(layer), PLACES[place][0], int(head))) == full
    for full, _ in [*expected["convert_to_base_name"], *expected["get_layer_head_from_adv_name"]]:
        assert original_name(place_of(full)) == full
    for full, (layer, head) in expected["get_layer_head_from_adv_name"]:
        info = code_info(CodeLabel(f"{place_of(full)}:7", "seven"))
        assert (info["layer"], info["head"], info["code"]) == (layer, head, 7)


def test_keys_of_hooks(expected):
    """A key of the original's cache names the component alone: attention or MLP, whatever codebook is in it."""
    components = {"attn": {"z", "attn_out"}, "mlp": {"mlp_out", "post"}}
    for key, (component, layer, group) in expected["cb_hook_key_to_info"]:
        for site in components[component]:
            info = code_info(CodeLabel(f"{Address(layer, site, group)}:1", "one"))
            assert (info["layer"], info["head"]) == (layer, group)
            assert info["cb_at"].startswith(component)
            assert codes_hook(Address(layer, site).hook_name).startswith(key[: key.index(component)])
    # get_cb_hook_key takes the places it does not know (attn_plus_mlp, qkv, transformer_block) for one of the two.
    for place, layer, head, key in expected["get_cb_hook_key"]:
        read = re.fullmatch(r"blocks\.(\d+)\.(attn|mlp)\.codebook_layer(?:\.codebook\.(\d+))?\.hook_codebook_ids", key)
        info = code_info(CodeLabel(f"{Address(layer, PLACES[place][0] if place != 'qkv' else 'qkv', head)}:1", "one"))
        assert info["cb_at"] == place
        assert (info["layer"], info["head"]) == (int(read[1]), None if read[3] is None else int(read[3]))


def infos(expected):
    found = [info for _, _, info, _ in expected["CodeInfo.from_str"]]
    return found + [info for some in expected["parse_topic_codes_string"].values() for info in some]


def test_code_infos_are_read_and_written_as_they_are(expected, tmp_path):
    """What is about interventions (pos, code_pos) is no label, and has the original's defaults when it is written."""
    n_read = 0
    for info in infos(expected):
        described = info | {"description": f"code {info['code']}", "pos": None, "code_pos": -1}
        path = tmp_path / "codes.json"
        path.write_text(json.dumps([described]))
        (label,) = read_labels(path)
        place = Address(info["layer"], PLACES[info["cb_at"]][0], info["head"])
        assert label.code.address == place
        assert (label.code.code, label.precision, label.recall, label.n_held_out) == tuple(
            info[key] for key in ("code", "prec", "recall", "num_acts")
        )
        write_code_info([label], path, overwrite=True)
        assert json.loads(path.read_text()) == [described]
        n_read += 1
    assert n_read == 18


def test_written_entries_keep_the_rules_of_the_original(expected, tmp_path):
    """Its constructor takes these fields alone, and a described code has figures with its regex."""
    fields = set(infos(expected)[0])
    labels = CodeLabels(
        [
            CodeLabel("L0.z.0:1", "comma", "regex", 0.95, 0.5, 0.66, 30, 31, pattern="(,)"),
            CodeLabel("L3.mlp_out:2", "token 'a'", "token", 1.0, 0.5, 0.67, 30, 31, tokens=(3,)),
        ]
    )
    write_code_info(labels, tmp_path / "codes.json")
    for entry in json.loads((tmp_path / "codes.json").read_text()):
        assert set(entry) == fields
        assert all(entry[key] is None or type(entry[key]) is int for key in ("code", "layer", "head", "pos", "code_pos", "num_acts"))
        assert entry["num_acts"] == 61
        assert entry["regex"] is None or 0 <= entry["prec"] <= 1 >= entry["recall"] >= 0


def test_a_model_of_the_web_app(expected, shared):
    """``ModelInfoForWebapp`` names the place by ``cb_at``, and groups by ``gcb``: what our names of codebooks are made of."""
    info = expected["ModelInfoForWebapp"]["loaded"]
    assert original_name(Address(0, PLACES[info["cb_at"]][0])) == f"layer0_{info['cb_at']}"
    for case in ("ascii_group_attn", "ascii_vanilla_mlp"):
        lines = (shared(f"golden/search/{case}") / "info.txt").read_text().splitlines()
        about = dict(line.split(": ") for line in lines)
        group = None if about["n_grps"] == "None" else int(about["n_grps"]) - 1
        name = original_name(Address(int(about["n_layers"]) - 1, PLACES[about["cb_at"]][0], group))
        keys = json.loads((shared(f"golden/search/{case}") / "features_to_tokens.json").read_text())["codebook"]
        assert place_of(name).site == place_of(keys).site
        assert ("_gcb" in name) == ("_gcb" in keys) == (about["gcb"] == "_gcb")
