"""`load_codebook_features` against the original's wrapped models: logits, loss, ids, gradients, generation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import SHARED
from tests.parity.golden import assert_floats
from tests.parity.gradients import assert_base_gradients
from tests.parity.wrapped import assert_gradients, assert_places, backward, language_model_loss, mask_of, real_positions
from tests.tiny import HOSTS
from tl_codebook import bypassed, load_codebook_features
from tl_codebook.attachment import sites
from tl_codebook.errors import CheckpointWarning
from tl_codebook.training import CodebookTrainingConfig

OWN = Path(__file__).with_name("cases")
OWN_CASES = sorted(path.name for path in OWN.iterdir() if path.name != "gpt2_mlp_mid_twice")  # which no site can hold
GOLDEN = sorted(path.name for path in (SHARED / "golden" / "wrap").glob("*")) or ["golden"]


class Wrapped(NamedTuple):
    """A case, and what was loaded."""

    spec: dict[str, Any]
    data: dict[str, Tensor]
    model: Any


def load(checkpoint: Path, base: Path, host: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        model, books = load_codebook_features(checkpoint, base, host)
    assert set(books) == set(sites(model))
    return model


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


@pytest.mark.parametrize("name", OWN_CASES)
def test_small_cases(name, host):
    data = load_file(OWN / name / "data.safetensors")
    model = load(OWN / name / "checkpoint", OWN / name / "base", host)
    with torch.no_grad():
        logits, cache = model.run_with_cache(data["input_ids"], **mask_of(data))
    keep = real_positions(data)
    assert_places(model, cache, data, "ids/", "", keep)
    assert_floats(logits[keep], data["logits"][keep], atol=1e-4)
    if "attention_mask" not in data:
        assert_floats(language_model_loss(logits, data["input_ids"]), data["loss"][0], atol=1e-4)


def test_a_codebook_that_never_ran_is_left_out_and_said(host):
    with pytest.warns(CheckpointWarning, match=r"2 codebooks that never run .*h\.0\.mlp\.codebook_layer"):
        _, books = load_codebook_features(OWN / "gpt2_idle_mlp/checkpoint", OWN / "gpt2_idle_mlp/base", host)
    assert list(books) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(params=[f"{host}-{name}" for name in GOLDEN for host in HOSTS])
def wrapped(request, shared):
    host, _, name = request.param.partition("-")
    folder = shared(f"golden/wrap/{name}")
    spec = json.loads((folder / "case.json").read_text())
    data = {key: value.long() if value.dtype == torch.int32 else value for key, value in load_file(folder / "data.safetensors").items()}
    return Wrapped(spec, data, load(folder / "checkpoint", shared(f"golden/bases/{spec['base']}"), host))


def test_every_golden_case_is_here(shared):
    index = json.loads(shared("golden/index.json").read_text())
    assert sorted(case["path"].removeprefix("wrap/") for case in index["cases"] if case["path"].startswith("wrap/")) == GOLDEN


def test_logits_and_ids(wrapped):
    spec, data, model = wrapped
    if spec["kind"] != "wrap":
        pytest.skip("a case of gradients only")
    keep = real_positions(data)
    with torch.no_grad(), bypassed(model):
        base = model(data["input_ids"], **mask_of(data))
    assert_floats(base[keep], data["base_logits"][keep], atol=1e-4)
    if spec["codebooks_enabled"]:
        with torch.no_grad():
            logits, cache = model.run_with_cache(data["input_ids"], **mask_of(data))
        assert_places(model, cache, data, "cb/", "/ids", keep)
    else:
        logits = base
    assert_floats(logits[keep], data["logits"][keep], atol=1e-4)
    labels = data.get("labels", data["input_ids"])
    assert_floats(language_model_loss(logits, labels), data["loss"].squeeze(), atol=1e-4)


def test_gradients(wrapped):
    spec, data, model = wrapped
    if not any("grad/" in key for key in data):
        pytest.skip("the case has no gradients")
    model.train()
    scale = spec["grad"]["scale"]
    losses = {f"{loss}/": loss for loss in spec["losses"]} if "losses" in spec else {"": spec["config_kwargs"].get("loss", "aeloss")}
    for prefix, loss in losses.items():
        config = CodebookTrainingConfig.original(loss)
        for point in sites(model).values():
            point.codebook.lm_gradient_to_codes = config.lm_gradient_to_codes
        with bypassed(model) if spec.get("codebooks_enabled") is False else warnings.catch_warnings():
            backward(model, data, config, scale)
        if "attention_mask" in data and not hasattr(model, "original_model"):
            # The original's loss counts padding, and what a HookedTransformer has there is its own: it gives padding no position.
            assert_base_gradients(model, data, f"{prefix}grad/base/")
        else:
            assert_gradients(model, data, prefix)


@pytest.mark.parametrize("cached", [True, False], ids=["kv_cache", "no_cache"])
def test_generation(wrapped, cached):
    spec, data, model = wrapped
    if "generate" not in data:
        pytest.skip("the case has no generated text")
    prompt, want = data["input_ids"][:, :6], data["generate"]
    with torch.no_grad(), bypassed(model) if spec.get("codebooks_enabled") is False else warnings.catch_warnings():
        got = model.generate(
            prompt,
            max_new_tokens=want.shape[1] - 6,
            do_sample=False,
            use_past_kv_cache=cached,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        )
    eos = 60
    for ours, theirs in zip(got.tolist(), want.tolist(), strict=True):
        length = theirs.index(eos, 6) + 1 if eos in theirs[6:] else len(theirs)  # the original pads after the end of a text
        assert ours[:length] == theirs[:length]
