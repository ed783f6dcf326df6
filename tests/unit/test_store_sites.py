"""Names of sites, groups and codes, and what they mean in a store."""

from types import SimpleNamespace

import pytest

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook.errors import ConfigError, InvalidCodeError, LabelError, UnknownHookError
from tl_codebook.names import Address, Code
from tl_codebook.store.sites import chosen_sites, label_of_site, stored_code

Z0, Z1, OUT, PRE = "blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.0.mlp.hook_pre"
BOOKS = {
    Z0: SimpleNamespace(n_groups=2, n_codes=8),
    OUT: SimpleNamespace(n_groups=1, n_codes=16),
    Z1: SimpleNamespace(n_groups=2, n_codes=8),
    PRE: SimpleNamespace(n_groups=3, n_codes=4),
}


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, {Z0: [0, 1], OUT: [0], Z1: [0, 1], PRE: [0, 1, 2]}),
        ("z", {Z0: [0, 1], Z1: [0, 1]}),
        ("L1.z", {Z1: [0, 1]}),
        ("L1.z.1", {Z1: [1]}),
        (Address(1, "z", 1), {Z1: [1]}),
        ([Address(1, "mlp_out")], {OUT: [0]}),
        (Z0, {Z0: [0, 1]}),
        (f"{Z0}.1", {Z0: [1]}),
        (PRE, {PRE: [0, 1, 2]}),
        (f"{PRE}.2", {PRE: [2]}),
        ("L1.mlp_out.0", {OUT: [0]}),
        (["L1.z.1", "L0.z.0", "L1.z.0", "L1.z.1"], {Z1: [0, 1], Z0: [0]}),
        (["L0.z.1", "z"], {Z0: [0, 1], Z1: [0, 1]}),
        (["z", "L0.z.1"], {Z0: [0, 1], Z1: [0, 1]}),
        ((name for name in ("mlp_out", "L0.z.1")), {OUT: [0], Z0: [1]}),
    ],
)
def test_what_names_mean(wanted, chosen):
    found = chosen_sites(BOOKS, wanted)
    assert found == chosen
    assert list(found) == list(chosen)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("q", r"the store has no codes of 'q'\. It has codes of: L0\.z, L1\.mlp_out, L1\.z, blocks\.0\.mlp\.hook_pre\.$"),
        ("L1.mlp_uot", r"Did you mean 'L1\.mlp_out'\?"),
        ("blocks.1.hook_mlp_ou", r"Did you mean .*'blocks\.1\.hook_mlp_out'"),
        ("L0.z.2", r"no codes of 'L0\.z\.2'\. .*L0\.z has 2 groups, 0 to 1\.$"),
        ("L1.mlp_out.1", r"L1\.mlp_out has 1 group, 0\.$"),
        ("L7.z", "no codes of 'L7.z'"),
        ("nonsense:", "no codes of 'nonsense:'"),
        ("", "no codes of ''"),
        (["z", "L9.z"], "no codes of 'L9.z'"),
        (Address(4, "z"), "no codes of 'L4.z'"),
        ("x" * 500, "no codes of 'x{80}'"),
    ],
)
def test_what_is_not_there(wanted, message):
    with pytest.raises(UnknownHookError, match=message):
        chosen_sites(BOOKS, wanted)


def test_what_is_no_name(unchecked):
    with pytest.raises(ConfigError, match="empty list"):
        chosen_sites(BOOKS, [])
    for wanted in ([3], [None], [["z"]]):
        with pytest.raises(LabelError):
            chosen_sites(BOOKS, wanted)
    with pytest.raises(UnknownHookError, match=r"^the graph has no codes of"):
        chosen_sites(BOOKS, "q", holder="the graph")


def test_codes():
    assert stored_code(BOOKS, Code(0, "z", 1, 7)) == Code(0, "z", 1, 7)
    assert stored_code(BOOKS, Code(1, "mlp_out", 0, 15)) == stored_code(BOOKS, Code(1, "mlp_out", None, 15)) == Code(1, "mlp_out", None, 15)
    for code, error, message in [
        ("L0.z:3", LabelError, r"L0\.z:3 names no group, and L0\.z has 2\. Write L0\.z\.0:3"),
        ("L0.z.2:3", InvalidCodeError, r"L0\.z has 2 groups of 8 codes\. Groups go from 0 to 1, codes from 0 to 7"),
        ("L0.z.1:8", InvalidCodeError, "codes from 0 to 7"),
        ("L1.mlp_out:16", InvalidCodeError, "1 group of 16 codes"),
        ("L1.mlp_out.1:1", InvalidCodeError, "1 group of 16 codes"),
        ("L3.z.0:1", UnknownHookError, r"the model has no codes of 'L3\.z\.0'"),
    ]:
        with pytest.raises(error, match=message):
            stored_code(BOOKS, Code.parse(code), holder="the model")


def test_labels_of_hook_points():
    assert [label_of_site(name) for name in (Z1, OUT, PRE)] == ["L1.z", "L1.mlp_out", PRE]


def test_a_group_is_no_codebook_to_collect_or_patch(tmp_path):
    model = make_host("native")
    tlc.attach(model, "z", n_codes=8)
    with pytest.raises(UnknownHookError, match=r"'L0.z.1' is one group of a codebook; here a whole one is meant. Say 'L0.z'"):
        tlc.collect_codes(model, ["w3 w4"], tmp_path / "store", sites="L0.z.1", progress=False)
    assert not (tmp_path / "store").exists()
