"""The losses of the original in a whole model: the gradients of base and codebooks after one backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.golden import MODULES, Case, assert_floats, at_group, paper_book, parameters, place_of, read_case
from tests.parity.gradients import assert_base_gradients, assert_codebook_gradients
from tests.tiny import HOSTS
from tl_codebook.attachment import attach, sites
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.names import hook_name
from tl_codebook.training import CodebookTrainingConfig
from tl_codebook.training.losses import LanguageModel

LOSSES = ["base", "fullaeloss"]


@pytest.fixture
def case(shared):
    return read_case(shared, "wrap/gpt2__mlp_k5__losses")


def wrapped(case: Case, shared: Any, host: str) -> Any:
    """The base with the codebooks of the checkpoint, whose other weights are those of the base."""
    model = load_hf(shared(f"golden/bases/{case.spec['base']}"), host=host)
    saved = load_file(case.folder / "checkpoint/model.safetensors")
    base = load_file(shared(f"golden/bases/{case.spec['base']}") / "model.safetensors")
    names = {name.replace(".module_layer", "").removeprefix("model."): name for name in saved if ".codebook_layer." not in name}
    assert names.keys() == {name for name in base if name != "lm_head.weight"}
    for name, there in names.items():
        assert torch.equal(base[name], saved[there]), name
    kwargs = case.spec["config_kwargs"]
    books = {
        hook_name(layer, "mlp_out"): paper_book(
            parameters(saved, MODULES["gpt2", "mlp"].format(layer=layer), 1), kwargs["k_codebook"], kwargs["similarity_metric"]
        )
        for layer in range(2)
    }
    attach(model, books)
    return model.train()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("host", ["bridge", *(["hooked"] if "hooked" in HOSTS else [])])
def test_gradients(case, shared, host, loss):
    """On a HookedTransformer, whose embedding and unembedding are two parameters, that of the tied one is the sum of theirs."""
    assert case.spec["losses"] == LOSSES
    assert case.spec["grad"]["scale"] == 1
    model, config, tokens = wrapped(case, shared, host), CodebookTrainingConfig.original(loss), case.data["input_ids"]
    for point in sites(model).values():
        point.codebook.lm_gradient_to_codes = config.lm_gradient_to_codes
    out = LanguageModel(model, config)(tokens, labels=tokens)
    out["loss"].backward()
    assert_floats(out["logits"], case.data["logits"], atol=1e-4)
    language_model, n_tokens, _ = out["sums"].sum(0)
    assert_floats(language_model / n_tokens, case.data["loss"][0], atol=1e-4)
    assert_base_gradients(model, case.data, f"{loss}/grad/base/")
    for key in case.spec["codebooks"]:
        place = place_of(key)
        book = sites(model)[place.hook_name].codebook
        assert_codebook_gradients(book, case.data, f"{loss}/grad/cb/{key}")
    with torch.no_grad():
        cache = model.eval().run_with_cache(tokens)[1]
    for key in case.spec["codebooks"]:
        assert at_group(cache[f"{place_of(key).hook_name}.hook_codes"], place_of(key)).tolist() == case.data[f"cb/{key}/ids"].tolist()
