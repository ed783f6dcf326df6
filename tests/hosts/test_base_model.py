"""Weights of a base in a folder of their own: what goes back into which model."""

import json

import pytest
import torch

from tests.hosts.training import TRAINED, assert_equal, host_of, weights
from tests.tiny import HOSTS
from tl_codebook.base_model import BASE_MANIFEST, describe, restore_base_, save_base, weights_of
from tl_codebook.errors import CheckpointError


@pytest.fixture(params=TRAINED)
def kind(request):
    return request.param


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def change(folder, **fields):
    path = folder / BASE_MANIFEST
    manifest = json.loads(path.read_text())
    manifest["model"]["config"] |= fields
    path.write_text(json.dumps(manifest))


def test_weights_come_back_with_what_was_said_of_them(kind, tmp_path):
    model = move(host_of(kind))
    save_base(model, tmp_path, figures={"loss": 1.5})
    other = host_of(kind)
    manifest = restore_base_(other, tmp_path)
    assert_equal(weights_of(other), weights_of(model))
    assert manifest["figures"] == {"loss": 1.5}
    assert manifest["model"] == describe(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_refused(kind, tmp_path, dtype):
    save_base(move(host_of(kind)), tmp_path)
    other = host_of(kind).to(dtype)
    before = weights(other)
    with pytest.raises(CheckpointError, match=rf"in float32, the model has it in {str(dtype)[6:]} .*model\.to\(torch\.float32\)"):
        restore_base_(other, tmp_path)
    assert_equal(weights(other), before)


@pytest.mark.parametrize("described", [True, False])
def test_a_dtype_is_told_without_a_description_too(tmp_path, described):
    model = host_of(TRAINED[0])
    save_base(model, tmp_path)
    if not described:
        path = tmp_path / BASE_MANIFEST
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "model"}))
    with pytest.raises(CheckpointError, match="would be rounded"):
        restore_base_(host_of(TRAINED[0]).to(torch.float16), tmp_path)
    restore_base_(host_of(TRAINED[0]), tmp_path)


DECIDING = {"hooked": {"act_fn": "relu", "eps": 1e-3}, "native": {"act_fn": "relu"}, "bridge": {"layer_norm_epsilon": 1e-3}}


def test_a_model_that_computes_something_else_is_refused(kind, tmp_path):
    if kind == "bridge-neox":
        pytest.skip("its configuration has other names")
    save_base(move(host_of(kind)), tmp_path)
    fields = DECIDING[json.loads((tmp_path / BASE_MANIFEST).read_text())["model"]["host"]]
    change(tmp_path, **fields)
    other = host_of(kind)
    before = weights(other)
    listed = "; ".join(rf"{name}: {value!r} then, [^;]* now" for name, value in sorted(fields.items()))
    with pytest.raises(CheckpointError, match=rf"the weights of another model \({listed}\)\. Restore into"):
        restore_base_(other, tmp_path)
    assert_equal(weights(other), before)


def test_what_decides_no_computation_may_differ(kind, tmp_path):
    model = move(host_of(kind))
    save_base(model, tmp_path)
    change(tmp_path, seed=9, tokenizer_name="x", model_name="y", _name_or_path="z", transformers_version="6", of_a_later_release=1)
    other = host_of(kind)
    restore_base_(other, tmp_path)
    assert_equal(weights_of(other), weights_of(model))


@pytest.mark.skipif("hooked" not in HOSTS, reason="needs two kinds of host")
def test_another_kind_of_host_is_refused(tmp_path):
    save_base(host_of("hooked-gpt2"), tmp_path)
    with pytest.raises(CheckpointError, match="host: 'hooked' then, 'bridge' now"):
        restore_base_(host_of("bridge-gpt2"), tmp_path)


def test_a_model_that_cannot_be_described_is_saved_and_goes_back_into_its_like(tmp_path):
    model = move(host_of("bridge-gpt2"))
    model._weights_processed = True
    save_base(model, tmp_path)
    assert json.loads((tmp_path / BASE_MANIFEST).read_text())["model"] is None
    other = host_of("bridge-gpt2")
    with pytest.raises(CheckpointError, match="a description: none then, one now"):
        restore_base_(other, tmp_path)
    other._weights_processed = True
    restore_base_(other, tmp_path)
    assert_equal(weights_of(other), weights_of(model))


@pytest.mark.parametrize("again", [None, "Resume from an earlier checkpoint."])
def test_a_folder_without_a_base(tmp_path, again):
    with pytest.raises(CheckpointError, match=rf"holds no {BASE_MANIFEST}.* {again or 'Train it again.'}$"):
        restore_base_(host_of(TRAINED[0]), tmp_path, **({} if again is None else {"again": again}))


def test_a_damaged_manifest_can_be_written_over(tmp_path):
    (tmp_path / BASE_MANIFEST).write_text("{")
    model = move(host_of(TRAINED[0]))
    save_base(model, tmp_path)
    other = host_of(TRAINED[0])
    restore_base_(other, tmp_path)
    assert_equal(weights_of(other), weights_of(model))
