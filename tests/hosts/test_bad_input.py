"""Bad input at attach and in interventions: what was asked, what is true, what to do; and nothing has changed.

Positions outside the sequence are in test_interventions, those of a generation in test_interventions_generate, interrupted blocks in
test_user_hooks, copies in test_attach.
"""

import numpy as np
import pytest
import torch
from jaxtyping import config
from torch import nn

import tl_codebook as tlc
from tests.hosts.prepared import LAST, LAST_Z, MODELS, K, ids_of, run
from tests.hosts.state import assert_same_state, state_of
from tests.tiny import make_hf, make_host
from tl_codebook import Codebook, CodebookConfig, ban_code, force_code
from tl_codebook.errors import (
    AttachError,
    CodebookError,
    ConfigError,
    EmptyInterventionWarning,
    InvalidCodeError,
    LabelError,
    PositionError,
    ShapeError,
    UnknownHookError,
)
from tl_codebook.hosts import is_bridge


@pytest.fixture(autouse=True)
def _as_users_see_it():
    """Switch the shape checks of the tests off: what the package itself says to a wrong argument is what users see."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(params=[MODELS[0], MODELS[-1]])
def model(request):
    """A fresh host; what these tests are about does not depend on the architecture."""
    return make_host(request.param)


# --- 21, 22: codes


@pytest.mark.parametrize(
    "code", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16), [3], np.array([3]), torch.tensor([3])]
)
def test_fault_21_whole_numbers_of_any_kind_are_codes(code):
    name, hook = force_code(code, layer=1, site="mlp_out")
    assert (name, str(hook.codes[0])) == (f"{LAST}.hook_codes", "L1.mlp_out:3")


@pytest.mark.parametrize("make", [force_code, ban_code])
@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (-1, InvalidCodeError, r"code -1 is negative, and negative ids do not count from the end. Give a whole number >= 0"),
        (3.0, InvalidCodeError, r"code 3.0 is a float. Give a whole number >= 0"),
        (True, InvalidCodeError, r"code True is a bool. Give a whole number"),
        (np.bool_(True), InvalidCodeError, r"is a bool"),
        (torch.tensor(True), InvalidCodeError, r"is a bool"),
        (torch.tensor(3.0), InvalidCodeError, r"is a (Tensor|torch.float32|float)"),
        (np.float32(3), InvalidCodeError, r"is a float32"),
        (None, InvalidCodeError, r"code None is a NoneType"),
        ("3", LabelError, r"cannot read '3' as a code. Write '<address>:<code>', such as 'L3.mlp_out:417'"),
        ([], InvalidCodeError, r"no code was given. Give one code or several"),
    ],
)
def test_fault_21_what_is_no_code(make, code, error, message):
    with pytest.raises(error, match=message):
        make(code, layer=1, site="mlp_out")


def test_fault_21_a_code_that_the_codebook_does_not_have(any_host):
    for hook in (force_code("L1.mlp_out:12"), ban_code("L1.mlp_out:12"), tlc.swap_codes("L1.mlp_out:1", "L1.mlp_out:12")):
        with pytest.raises(InvalidCodeError, match=r"_code.*: code 12 was asked for, but the codebook has 12. Give 0 to 11"):
            run(any_host.model, hook)
    assert torch.equal(ids_of(run(any_host.model)), ids_of(any_host.before))


def test_fault_22_repeated_and_too_many_codes(host):
    for make in (force_code, ban_code):
        with pytest.raises(InvalidCodeError, match=r"code 4 was given more than once at L1.mlp_out. Give each code once"):
            make([4, 2, 4], layer=1, site="mlp_out")
        with pytest.raises(LabelError, match=r"these codes sit at L1.mlp_out, L1.z.0. Make one hook for each"):
            make(["L1.mlp_out:1", "L1.z.0:1"])
    with pytest.raises(InvalidCodeError, match=r"4 codes were given for 3 slots. Give at most 3, or slot='append'"):
        run(host.model, force_code([0, 1, 2, 3], layer=1, site="mlp_out"))
    assert torch.equal(ids_of(run(host.model)), ids_of(host.before))
    assert ids_of(run(host.model, force_code([0, 1, 2, 3], layer=1, site="mlp_out", slot="append"))).shape[-1] == K + 4


@pytest.mark.parametrize("slot", [True, 1.0, "last", None])
def test_fault_22_what_is_no_slot(slot):
    with pytest.raises(ConfigError, match=r"slot=.* was asked for. Give a whole number \(-1 is the least similar\), 'all' or 'append'"):
        force_code("L1.mlp_out:1", slot=slot)


def test_fault_22_prompt_and_generated_only_exclude_each_other():
    with pytest.raises(ConfigError, match=r"prompt_only and generated_only were both asked for, which leaves no position"):
        force_code("L1.mlp_out:1", prompt_only=True, generated_only=True)


# --- 23: layers, heads, hook points


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ("mlpout", {}, r"no site 'mlpout'. Did you mean 'mlp_out'.*Sites: z q k v"),
        ("z", {"layers": 2}, r"no layer 2: the model has 2 layers. Give 0 to 1, or -2 to -1"),
        ("z", {"layers": [0, -3]}, r"no layer -3: the model has 2 layers"),
        ("z", {"layers": True}, r"no layer True"),
        ("z", {"layers": 1.5}, r"no layer 1.5"),
        ("z", {"layers": ["0"]}, r"no layer '0'"),
        ("z", {"layers": []}, r"no layer was given"),
        (
            {"blocks.0.attn.hook_zz": CodebookConfig(4)},
            {},
            r"no hook point 'blocks.0.attn.hook_zz' on this (Hooked|Bridge|Transformer).*hook_z'",
        ),
        ({"L4.z": CodebookConfig(4)}, {}, r"no hook point 'blocks.4.attn.hook_z'.*Layers go from 0 to 1"),
        ({}, {}, r"an empty mapping of codebooks was given"),
    ],
)
def test_fault_23_places_that_do_not_exist(model, sites, options, message):
    before = state_of(model)
    with pytest.raises(UnknownHookError, match=message):
        tlc.attach(model, sites, **({} if isinstance(sites, dict) else {"n_codes": 4}), **options)
    assert_same_state(state_of(model), before)


def test_fault_23_a_head_that_does_not_exist(any_host):
    for hook in (force_code("L1.z.4:1"), ban_code("L1.z.9:1"), force_code(1, layer=1, site="z", head=4)):
        with pytest.raises(LabelError, match=r"group \d was asked for, but the codebook has 4. Give 0 to 3"):
            run(any_host.model, hook)
    with pytest.raises(LabelError, match=r"L1.z has 4 groups. Say which: 'L1.z.0:1' to 'L1.z.3:1'"):
        run(any_host.model, force_code("L1.z:1"))
    assert torch.equal(ids_of(run(any_host.model), LAST_Z), ids_of(any_host.before, LAST_Z))


# --- 24: positions


def test_fault_24_positions(host):
    with pytest.raises(
        PositionError, match=r"blocks.1.hook_mlp_out: position 7 was asked for, but the sequence has 7 positions. Give 0 to 6"
    ):
        run(host.model, force_code("L1.mlp_out:1", pos=7))
    with pytest.raises(PositionError, match=r"a mask of shape \(5,\) was given for 2 x 7 positions. Give \[7\] or \[2, 7\]"):
        run(host.model, force_code("L1.mlp_out:1", pos=torch.ones(5, dtype=torch.bool)))
    with pytest.warns(EmptyInterventionWarning, match="it will change nothing"):
        hook = force_code("L1.mlp_out:1", pos=[])
    assert torch.equal(ids_of(run(host.model, hook)), ids_of(host.before))


# --- 29, 34: tensors that do not fit


BAD_X = {
    "width": lambda x: x[..., :5],
    "positions": lambda x: x[:, :3],
    "batch axis": lambda x: x[0],
    "extra axis": lambda x: x.unsqueeze(0),
    "whole numbers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("fault", BAD_X)
def test_fault_29_and_34_a_hook_at_hook_x_that_returns_something_else(host, fault):
    for name in (LAST, LAST_Z):
        with pytest.raises(ShapeError, match=name):
            run(host.model, (f"{name}.hook_x", lambda x, hook: BAD_X[fault](x)))
        assert torch.equal(ids_of(run(host.model), name), ids_of(host.before, name))


def test_fault_29_a_codebook_of_another_width(any_model):
    before = state_of(any_model)
    for place, book in (("L0.z", Codebook(8, CodebookConfig(4))), ("L0.mlp_out", Codebook(64, CodebookConfig(4)))):
        with pytest.raises(
            ShapeError,
            match=rf"the codebook for 'blocks.0.*' has d_in={book.d_in}, the activation there has 32 values. Make one of d_in=32",
        ):
            tlc.attach(any_model, {place: book})
    with pytest.raises(
        ShapeError, match=r"hook_attn_scores' carries \(2, 4, 3, 3\) for tokens \(2, 3\): not \[batch pos ...\]. Choose another"
    ):
        tlc.attach(any_model, {"blocks.0.attn.hook_attn_scores": CodebookConfig(4)})
    assert_same_state(state_of(any_model), before)


def test_fault_34_a_hook_point_with_whole_numbers_is_refused(model):
    name = "embed.hook_in"
    if not is_bridge(model):
        pytest.skip("a HookedTransformer has no hook point that carries token ids")
    before = state_of(model)
    with pytest.raises(ShapeError, match=r"'embed.hook_in' carries torch.int64. A codebook takes floating-point activations"):
        tlc.attach(model, {name: CodebookConfig(4)})
    assert_same_state(state_of(model), before)


# --- 30: configurations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_codes": 0}, r"n_codes=0 was asked for. Give a whole number >= 1"),
        ({"n_codes": True}, r"n_codes=True was asked for"),
        ({"n_codes": 8.0}, r"n_codes=8.0 was asked for"),
        ({"n_codes": "8"}, r"n_codes='8' was asked for"),
        ({"n_codes": 8, "k": 0}, r"k=0 was asked for. Give a whole number >= 1"),
        ({"n_codes": 8, "k": 9}, r"k=9 codes were asked for, but there are n_codes=8. Give k <= n_codes"),
        (
            {"n_codes": 8, "n_groups": 5},
            r"'blocks.0.hook_mlp_out': d_in=32 cannot be split into n_groups=5 equal groups. Divisors near 5: 2, 4",
        ),
        ({"n_codes": 8, "similarity": "cosine"}, r"similarity='cosine' is not known. Choose one of"),
        ({"n_codes": 8, "selection": "residual", "reduce": "mean"}, r"Greedy pursuit adds up its codes: use reduce='sum'"),
        ({"n_codes": 8, "on_nonfinite": "ignore"}, r"on_nonfinite='ignore' is not known. Choose 'raise' or 'propagate'"),
        ({"n_codes": 8, "select": "nearest"}, r"attach has no option 'select'. Did you mean 'selection'"),
        ({}, r"n_codes was not given. Say how many codes each group has"),
    ],
)
def test_fault_30_configurations_that_cannot_be(model, options, message):
    before = state_of(model)
    with pytest.raises(ConfigError, match=message):
        tlc.attach(model, "mlp_out", **options)
    assert_same_state(state_of(model), before)


def test_fault_30_one_code_is_enough(model):
    tlc.attach(model, ["z", "mlp_out"], n_codes=1)
    assert (ids_of(run(model)) == 0).all()


# --- 35: attach and detach out of order


def test_fault_35_attach_twice_and_detach_what_is_not_there(any_model):
    tlc.attach(any_model, "mlp_out", n_codes=4)
    before = state_of(any_model)
    with pytest.raises(
        AttachError,
        match=r"'blocks.0.hook_mlp_out' already holds a codebook \(4 codes, k=1\). Call detach\(model, 'blocks.0.hook_mlp_out'\)",
    ):
        tlc.attach(any_model, "mlp_out", n_codes=4)
    for name in ("z", "L0.z", "blocks.0.attn.hook_z", "no_such_name"):
        with pytest.raises(UnknownHookError, match=rf"no codebook sits at '{name}'.*Codebooks sit at: blocks.0.hook_mlp_out, blocks.1"):
            tlc.detach(any_model, ["mlp_out", name])
    assert_same_state(state_of(any_model), before)


def test_fault_35_use_after_detach(any_model):
    books = tlc.attach(any_model, "mlp_out", n_codes=4)
    tlc.detach(any_model)
    assert tlc.detach(any_model) == {}
    with (
        pytest.raises(UnknownHookError, match=r"no hook point 'blocks.1.hook_mlp_out.hook_codes'"),
        tlc.steer(any_model, [force_code("L1.mlp_out:1")]),
    ):
        pytest.fail("the block must not run")
    with (
        pytest.raises(UnknownHookError, match=r"no codebook sits at 'mlp_out'.*no site; call attach first"),
        tlc.bypassed(any_model, "mlp_out"),
    ):
        pytest.fail("the block must not run")
    assert books[LAST](torch.randn(3, 32)).shape == (3, 32)  # the codebook itself goes on


# --- The rest


def test_what_is_no_host_is_refused():
    for thing in (nn.Linear(2, 2), make_hf("gpt2"), "gpt2", None):
        with pytest.raises(AttachError, match=rf"a {type(thing).__name__} was given where a TransformerLens model is needed.*load_hf"):
            tlc.attach(thing, "z", n_codes=4)


def test_hooks_in_the_wrong_place(host):
    name, function = force_code("L1.mlp_out:1")
    with pytest.raises(
        ConfigError, match=r"force_code\(L1.mlp_out:1, pos=all\) was called outside of a codebook. Use it as a forward hook at"
    ):
        run(host.model, (LAST, function))
    with pytest.raises(ConfigError, match=r"is not a pair of hook name and function"), tlc.steer(host.model, (name, function)):
        pytest.fail("the block must not run")
    with pytest.raises(CodebookError), tlc.steer(host.model, [("blocks.1.hook_resid_post", function)]):
        pytest.fail("the block must not run")
    assert torch.equal(ids_of(run(host.model)), ids_of(host.before))
