"""Codebooks of the original on models whose weights were processed: the same codes and log-probabilities, or a refusal.

The original converts with whatever processing it is told, and some of its results are other models (``preserves`` in case.json is false).
Those are not copied: here every option gives the ids and log-probabilities of the unprocessed model.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.parity.golden import Case, assert_floats, assert_ids, place_of, read_case
from tests.tiny import HOSTS
from tl_codebook.attachment import attach
from tl_codebook.basis import fingerprint
from tl_codebook.checkpoint import Codebooks
from tl_codebook.convert.codebook_features import read_codebook_features
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import BasisMismatchError, BasisWarning
from tl_codebook.names import codes_hook

CASES = ["gpt2__mlp_k5", "neo__mlp_k5", "neox__attn_preproj_g4_k8"]
OPTIONS = [
    "off",
    "default(None)",
    "only:fold_ln",
    "only:center_writing_weights",
    "only:center_unembed",
    "only:fold_value_biases",
    "only:refactor_factored_attn_matrices",
    "all_on",
]
FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
DEFAULTS = dict.fromkeys(FLAGS, True) | {"refactor_factored_attn_matrices": False}
"""What `HookedTransformer.from_pretrained` does unless told otherwise."""


class Conversion(NamedTuple):
    """A case, the unprocessed model, and codebooks in its basis."""

    case: Case
    model: Any
    books: Codebooks

    @property
    def keys(self) -> list[str]:
        return [key.removeprefix("off/ids/") for key in self.case.data if key.startswith("off/ids/")]


@pytest.fixture(scope="module", params=[f"{host}-{case}" for case in CASES for host in HOSTS])
def conversion(request, shared):
    host, _, name = request.param.partition("-")
    case = read_case(shared, f"conversion/{name}")
    data = {key: value.long() if "/ids/" in key else value for key, value in case.data.items()}
    original = read_codebook_features(shared(f"golden/wrap/{name}/checkpoint"), shared(f"golden/bases/{case.spec['base']}"))
    model = load_hf(original.hf_model, original.tokenizer, host)
    return Conversion(Case(case.spec, data, case.folder), model, Codebooks(original.books, fingerprint(model, list(original.books))))


def check(conversion: Conversion, model: Any, *, centred: bool, shifted: bool, logits: Tensor | None = None) -> None:
    """Attach to a model that was processed as said, and compare with the unprocessed one."""
    books = copy.deepcopy(conversion.books)
    if centred and "mlp" in conversion.case.spec["config_kwargs"]["codebook_at"]:
        with pytest.raises(BasisMismatchError, match="center_writing_weights"):
            attach(model, books)
        return
    offset = shifted and conversion.case.spec["config_kwargs"]["codebook_at"] == "attn_preproj"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BasisWarning)
        attach(model, books)
    assert [w.category for w in caught if issubclass(w.category, BasisWarning)] == [BasisWarning] * offset
    with torch.no_grad():
        got, cache = model.run_with_cache(conversion.case.data["input_ids"])
    for key in conversion.keys:
        place = place_of(key)
        assert_ids(cache[codes_hook(place.hook_name)], conversion.case.data[f"off/ids/{key}"], place)
    assert_floats(got.log_softmax(-1), conversion.case.data["off/logits"].log_softmax(-1), atol=1e-4)
    if logits is not None:
        assert_floats(got, logits, atol=1e-4)


def test_every_run_is_here(conversion):
    assert [run["options"] for run in conversion.case.spec["runs"]] == OPTIONS
    assert len(conversion.keys) == 2 * next(iter(conversion.books.values())).n_groups


@pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("conversion", [f"hooked-{case}" for case in CASES], indirect=True)
def test_a_processed_hooked_transformer(conversion, option):
    run = {run["options"]: run for run in conversion.case.spec["runs"]}[option]
    flags, model = run["hooked_kwargs"] or DEFAULTS, copy.deepcopy(conversion.model)
    if "error" in run:
        assert flags["refactor_factored_attn_matrices"]
        with pytest.raises(AssertionError, match="refactor the QK circuit when using rotary embeddings"):
            model.load_and_process_state_dict(model.state_dict(), **flags)
        return
    model.load_and_process_state_dict(model.state_dict(), **flags)
    logits = conversion.case.data["off/logits"] if option == "off" else None
    check(conversion, model.eval(), centred=flags["center_writing_weights"], shifted=flags["fold_value_biases"], logits=logits)


@pytest.mark.parametrize("mode", ["raw", "compatible, unprocessed", "compatible, processed"])
@pytest.mark.parametrize("conversion", [f"bridge-{case}" for case in CASES], indirect=True)
def test_a_bridge_in_compatibility_mode(conversion, mode):
    model, processed = copy.deepcopy(conversion.model), mode == "compatible, processed"
    if mode != "raw":
        model.enable_compatibility_mode(no_processing=not processed, disable_warnings=True)
    check(conversion, model, centred=processed, shifted=processed, logits=None if processed else conversion.case.data["off/logits"])
