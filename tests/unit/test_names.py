"""Sites, hook names, addresses and labels."""

import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_codebook.errors import InvalidCodeError, LabelError, nearest
from tl_codebook.names import (
    HEAD_SITES,
    SITES,
    Address,
    Code,
    as_address,
    as_code,
    as_codes,
    codes_hook,
    hook_name,
    input_hook,
    split_hook_name,
)

WORDS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=6)
PREFIXES = st.lists(st.one_of(WORDS, st.builds("{}.{}".format, WORDS, st.integers(0, 99))), max_size=3)
OTHER_HOOKS = st.builds(
    lambda prefixes, name: ".".join([*prefixes, f"hook_{name}"]), PREFIXES, WORDS.filter(lambda w: w not in ("x", "codes"))
)
GROUPS = st.none() | st.integers(0, 99)
ADDRESSES = st.one_of(
    st.builds(Address, st.integers(0, 200), st.sampled_from(list(SITES)), GROUPS),
    st.builds(Address, st.none(), OTHER_HOOKS, GROUPS),
)


@given(ADDRESSES)
def test_an_address_parses_back(address):
    assert Address.parse(str(address)) == address
    assert hash(Address.parse(str(address))) == hash(address)
    assert as_address(str(address)) == address
    assert as_address(address) is address


@given(ADDRESSES, st.integers(0, 10**6))
def test_a_label_parses_back(address, number):
    code = Code(address.layer, address.site, address.group, number)
    assert str(code) == f"{address}:{number}"
    assert Code.parse(str(code)) == code
    assert as_code(str(code)) == code
    assert as_code(code) is code
    assert code.address == address
    assert code.hook_name == address.hook_name


@given(st.text("Lblocks.0123456789:_hookz\u0663\u00b2 \n-", max_size=24))
def test_any_text_is_read_one_way_or_refused(text):
    for kind in (Address, Code):
        try:
            value = kind.parse(text)
        except LabelError:
            continue
        assert kind.parse(str(value)) == value


@pytest.mark.parametrize(
    ("text", "layer", "site", "group", "name"),
    [
        ("L5.z.2", 5, "z", 2, "blocks.5.attn.hook_z"),
        ("L3.mlp_out", 3, "mlp_out", None, "blocks.3.hook_mlp_out"),
        ("L0.resid_delta", 0, "resid_delta", None, "blocks.0.hook_resid_delta"),
        ("L12.post", 12, "post", None, "blocks.12.mlp.hook_post"),
        ("blocks.5.attn.hook_z.2", 5, "z", 2, "blocks.5.attn.hook_z"),
        ("blocks.3.hook_mlp_out", 3, "mlp_out", None, "blocks.3.hook_mlp_out"),
        ("blocks.0.mlp.hook_pre", None, "blocks.0.mlp.hook_pre", None, "blocks.0.mlp.hook_pre"),
        ("blocks.0.mlp.hook_pre.3", None, "blocks.0.mlp.hook_pre", 3, "blocks.0.mlp.hook_pre"),
        ("hook_embed", None, "hook_embed", None, "hook_embed"),
    ],
)
def test_addresses_are_read(text, layer, site, group, name):
    address = Address.parse(text)
    assert (address.layer, address.site, address.group) == (layer, site, group)
    assert address.hook_name == name


def test_a_code_outside_the_site_table_is_named_by_its_hook():
    code = Code.parse("blocks.0.mlp.hook_pre.1:7")
    assert code == Code(None, "blocks.0.mlp.hook_pre", 1, 7)
    assert str(code) == "blocks.0.mlp.hook_pre.1:7"
    assert code.hook_name == "blocks.0.mlp.hook_pre"


def test_a_hook_name_of_the_site_table_becomes_its_site():
    assert Code(None, "blocks.5.attn.hook_z", 2, 88) == Code(5, "z", 2, 88)
    assert str(Code.parse("blocks.3.hook_mlp_out:4")) == "L3.mlp_out:4"
    assert as_address(site="blocks.5.attn.hook_q") == Address(5, "q")


@pytest.mark.parametrize("site", SITES)
def test_every_site_has_one_hook_name(site):
    name = hook_name(7, site)
    assert name == f"blocks.7.{SITES[site]}"
    assert split_hook_name(name) == (7, site)


def test_hook_names_outside_the_table_stay_whole():
    assert split_hook_name("blocks.7.mlp.hook_pre") == (None, "blocks.7.mlp.hook_pre")
    assert split_hook_name("blocks.7.hook_mlp_out.hook_codes") == (None, "blocks.7.hook_mlp_out.hook_codes")
    assert hook_name(None, "hook_embed") == "hook_embed"
    assert set(HEAD_SITES) == {"z", "q", "k", "v"}
    assert codes_hook("blocks.3.hook_mlp_out") == "blocks.3.hook_mlp_out.hook_codes"
    assert input_hook("blocks.3.hook_mlp_out") == "blocks.3.hook_mlp_out.hook_x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("L3", "neither a site with a layer nor a hook name"),
        ("z", "neither a site with a layer"),
        ("z.2", "L5.z.2"),
        ("blocks.3.mlp_out", "neither a site with a layer"),
        ("L3.", "cannot read 'L3.'"),
        ("L-1.z", "cannot read 'L-1.z'"),
        ("L3.z.-1", "cannot read"),
        ("L3.z.2.1", "cannot read"),
        ("L3.z:4", "cannot read 'L3.z:4' as an address"),
        (" L3.z", "cannot read"),
        ("L3.z\n", "cannot read"),
        ("L3..z", "cannot read"),
        ("L\u0663.z", "cannot read"),
        ("L3.z.\u0662", "cannot read"),
        ("L3.mlpout", "Did you mean 'mlp_out'"),
        ("L3.mlp_out.x", "no site 'mlp_out.x'"),
        ("L3.hook_mlp_out", "resid_pre resid_mid resid_post"),
    ],
)
def test_bad_addresses_say_how_to_write_them(text, message):
    with pytest.raises(LabelError) as raised:
        Address.parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L3.mlp_out", "Write '<address>:<code>'"),
        ("L3.mlp_out:", "cannot read 'L3.mlp_out:' as a code"),
        ("L3.mlp_out:-4", "L3.mlp_out:417"),
        ("L3.mlp_out:4.0", "cannot read"),
        ("L3.mlp_out: 4", "cannot read"),
        ("L3.mlp_out:4\n", "cannot read"),
        ("L3.mlp_out:\u0664", "cannot read"),
        ("L3.mlp_out:\u00b2", "cannot read"),
        ("417", "cannot read '417' as a code"),
        ("z:4", "neither a site with a layer"),
        ("L3.mlpout:4", "Did you mean 'mlp_out'"),
        (":4", "cannot read ''"),
        ("L3.z:2:4", "cannot read 'L3.z:2' as an address"),
    ],
)
def test_bad_labels_say_how_to_write_them(text, message):
    for read in (Code.parse, as_code):
        with pytest.raises(LabelError) as raised:
            read(text)
        assert message in str(raised.value)


def test_a_site_that_no_name_resembles_is_refused_with_the_list():
    with pytest.raises(LabelError) as raised:
        Address(1, "qqqqqqq")
    assert str(raised.value).startswith("no site 'qqqqqqq'.")
    assert str(raised.value).endswith(f"Sites: {' '.join(SITES)}.")


@pytest.mark.parametrize("layer", [None, 1])
def test_a_site_that_is_no_text_is_refused(layer, unchecked):
    with pytest.raises(LabelError, match="5"):
        Address(layer, 5)


@pytest.mark.parametrize("number", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.uint8)])
def test_whole_numbers_of_any_library_are_taken(number, unchecked):
    code = Code(number, "z", number, number)
    assert code == Code(7, "z", 7, 7)
    assert [type(value) for value in (code.layer, code.group, code.code)] == [int, int, int]
    assert str(code) == "L7.z.7:7"
    assert as_code(number, layer=5, site="z", group=2) == Code(5, "z", 2, 7)


BAD_NUMBERS = [
    (True, "bool"),
    (np.bool_(True), "bool"),
    (torch.tensor(True), "bool"),
    (3.0, "float"),
    (np.float32(3), "float32"),
    (torch.tensor(3.0), "Tensor"),
    ("3", "str"),
    ([3], "list"),
    (-1, "negative ids do not count from the end"),
    (np.int64(-1), "negative"),
    (torch.tensor(-1), "negative"),
]


@pytest.mark.parametrize(("number", "message"), BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("field", ["layer", "group", "code"])
def test_what_is_no_whole_number_is_refused(field, number, message, unchecked):
    parts = {"layer": 5, "site": "z", "group": 2, "code": 88} | {field: number}
    with pytest.raises(InvalidCodeError if field == "code" else LabelError) as raised:
        Code(**parts)
    assert str(raised.value).startswith(field)
    assert message in str(raised.value)
    assert "Give a whole number >= 0" in str(raised.value)


@pytest.mark.parametrize("number", [number for number, _ in BAD_NUMBERS if not isinstance(number, str)] + [None], ids=repr)
def test_as_code_refuses_what_is_no_whole_number(number):
    with pytest.raises(InvalidCodeError, match="Give a whole number"):
        as_code(number, layer=5, site="z", group=2)


def test_a_row_about_a_code_stands_for_it():
    class Hit:
        code = Code.parse("L3.z.2:7")

    assert as_code(Hit()) == Hit.code
    assert as_codes(Hit()) == as_codes([Hit(), Code.parse("L3.z.2:8")])[:1] == (Hit.code,)
    with pytest.raises(LabelError, match="given together with layer="):
        as_code(Hit(), layer=3)


def test_head_is_group():
    assert as_address(layer=5, site="z", head=2) == as_address(layer=5, site="z", group=2) == Address(5, "z", 2)
    assert as_address(layer=5, site="z", head=2, group=2) == Address(5, "z", 2)
    assert as_code(88, layer=5, site="z", head=0) == Code(5, "z", 0, 88)
    with pytest.raises(LabelError, match="group=1 and head=2 were both given and differ"):
        as_address(layer=5, site="z", head=2, group=1)


def test_addresses_in_parts():
    code = Code(5, "z", 2, 88)
    assert as_address(code) == Address(5, "z", 2)
    assert as_address(layer=3, site="mlp_out") == Address(3, "mlp_out")
    with pytest.raises(LabelError, match="no address was given"):
        as_address()
    with pytest.raises(LabelError, match="no address was given"):
        as_address(layer=3)
    for parts in ({"layer": 3}, {"site": "z"}, {"group": 0}, {"head": 0}):
        with pytest.raises(LabelError, match="was given together with layer="):
            as_address("L5.z", **parts)
        with pytest.raises(LabelError, match="given together with layer="):
            as_code("L5.z.2:88", **parts)


def test_an_address_of_another_kind_is_refused(unchecked):
    with pytest.raises(LabelError, match="cannot read 5 as an address"):
        as_address(5)


def test_a_code_together_with_parts_says_so():
    with pytest.raises(LabelError, match="given together with"):
        as_code(Code(5, "z", 2, 88), layer=3)


def test_a_number_without_a_place_is_refused():
    for parts in ({}, {"layer": 3}):
        with pytest.raises(LabelError, match="code 88 was given without its place"):
            as_code(88, **parts)
    with pytest.raises(LabelError, match="cannot read '88' as a code"):
        as_code("88", layer=5, site="z")


def test_codes_sort_by_layer_site_group_and_code():
    in_order = [
        "blocks.0.mlp.hook_pre:9",
        "hook_embed:1",
        "L0.z.0:3",
        "L0.z.0:20",
        "L0.z.1:0",
        "L0.v.0:0",
        "L0.mlp_out:5",
        "L0.resid_post:1",
        "L2.z.0:0",
        "L10.z.0:0",
    ]
    codes = [Code.parse(label) for label in in_order]
    backwards = codes[::-1]
    assert sorted(backwards) == codes
    assert max(codes) == codes[-1]
    assert codes[1] > codes[0]
    assert len({*codes, *map(Code.parse, in_order)}) == len(codes)


def test_a_code_has_no_order_with_other_things():
    with pytest.raises(TypeError, match="not supported between"):
        sorted(["L0.z.0:4", Code.parse("L0.z.0:3")])
    assert Code.parse("L0.z.0:3") != "L0.z.0:3"


def test_codes_of_one_call():
    place = {"layer": 5, "site": "z", "head": 2}
    wanted = (Code(5, "z", 2, 1), Code(5, "z", 2, 4))
    for many in ([1, 4], (1, 4), range(1, 5, 3), np.array([1, 4]), torch.tensor([1, 4]), (code for code in [1, 4])):
        assert as_codes(many, **place) == wanted
    assert as_codes(["L5.z.2:1", wanted[1]]) == wanted
    for one in (1, np.int64(1), np.array(1), torch.tensor(1)):
        assert as_codes(one, **place) == wanted[:1]
    assert as_codes("L5.z.2:1") == as_codes(wanted[0]) == wanted[:1]


def test_codes_of_one_call_are_refused():
    for nothing in ([], (), torch.tensor([], dtype=torch.long)):
        with pytest.raises(InvalidCodeError, match="no code was given"):
            as_codes(nothing, layer=5, site="z")
    with pytest.raises(LabelError, match=r"these codes sit at L5\.z\.2, L5\.z\.3\. Make one hook for each"):
        as_codes(["L5.z.2:1", "L5.z.3:1"])
    with pytest.raises(InvalidCodeError, match=r"code 4 was given more than once at L5\.z"):
        as_codes([4, 1, 4], layer=5, site="z")
    with pytest.raises(InvalidCodeError, match="Tensor"):
        as_codes(torch.tensor([[1, 4], [2, 3]]), layer=5, site="z")
    with pytest.raises(InvalidCodeError, match=r"code 1\.5 is a float"):
        as_codes([1, 1.5], layer=5, site="z")


def test_the_nearest_names_are_offered():
    assert nearest("resid_pr", ["resid_pre", "hook_z"]) == "Did you mean 'resid_pre'? "
    assert nearest("mlp", ["xyz"]) == ""
    assert nearest("hook_a", ["hook_b", "hook_c", "hook_d"], n=2).count("hook_") == 2
