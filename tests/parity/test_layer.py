"""One codebook against the original's CodebookLayer and GroupCodebookLayer: snap, gradients, options, running totals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.golden import DEFAULTS, Case, Hook, assert_floats, assert_ids, option_hooks, paper_book, parameters, read_case, stacked
from tests.tiny import make_native_bridge
from tl_codebook.attachment import attach
from tl_codebook.codebook import Codebook
from tl_codebook.names import Address
from tl_codebook.training import CodebookTrainingConfig, codebook_loss

SNAPS = ["ip_d8_c20_k1", "ip_d32_c50_k5", "ip_single_token", "euclidean_d32_c50_k5", "group_ip_d32_g4_c50_k8", "group_ip_g1"]
LOSSES = ["base", "aeloss", "fullaeloss", "fullaeloss-0.7", "vqvae", "vqvae-1.0"]
METRICS = ["metrics_ip", "metrics_euclidean"]


def book_of(case: Case) -> Codebook:
    layer = case.spec["layer"]
    return paper_book(parameters(case.data, "state/", layer.get("num_codebooks", 1)), layer["k"], layer["metric"])


@pytest.fixture(params=SNAPS)
def case(request, shared):
    return read_case(shared, f"layer/{request.param}")


def test_snap(case):
    book, data = book_of(case), case.data
    y = book.normalise(book.grouped(data["x"]))
    assert_floats(y, stacked(data, "normed/cb", book.n_groups), atol=1e-5)
    assert book.encode(data["x"]).tolist() == stacked(data, "ids/cb", book.n_groups).tolist()
    assert_floats(book(data["x"]), data["out"], atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(case, loss):
    """The original adds its losses to the gradients in its backward pass; here they are terms of the loss."""
    assert loss in case.spec["losses"]
    config = CodebookTrainingConfig.original(loss)
    book, data = book_of(case).train(), case.data
    x = data["x"].clone().requires_grad_()
    book.lm_gradient_to_codes = config.lm_gradient_to_codes
    objective = (book(x) * data["upstream"]).sum() + codebook_loss([book], config)
    objective.backward()
    got = {"x": x.grad} | {name: parameter.grad for name, parameter in book.named_parameters()}
    want = {"x": data[f"grad/{loss}/x"]} | parameters(data, f"grad/{loss}/", book.n_groups)
    assert set(got) == set(want)
    for name in want:
        assert_floats(got[name], want[name], atol=1e-5, of_largest=1e-4)


@pytest.mark.parametrize("name", METRICS)
def test_running_totals(shared, name):
    """The totals after each of three forward passes.

    By design we count activations, where the original counts forward passes in which a code fired; so its counts are those of our passes
    with any activation, added up. Its ``most_common_counts`` follows from them and is not compared. Its `counts[-1]` would credit empty
    slots to the last code; no step of these cases has one, and we do not count them at all.
    """
    case = read_case(shared, f"layer/{name}")
    assert case.spec["blocked"] is False
    book = book_of(case).eval()
    book.count_when = "always"
    passes, before = torch.zeros_like(book.usage.counts), book.usage.counts.clone()
    for step in case.spec["steps"]:
        x = case.data[f"x{step['step']}"]
        ids = stacked(case.data, f"{step['step']}/ids/cb", book.n_groups)
        assert book.encode(x).tolist() == ids.tolist()
        with torch.no_grad():
            book(x)
        fired = book.usage.counts - before
        passes, before = passes + (fired > 0), book.usage.counts.clone()
        assert fired.tolist() == [torch.bincount(ids[:, :, group].flatten(), minlength=book.n_codes).tolist() for group in range(2)]
        of_group = {
            "reconstruction_mse": book.usage.error / book.usage.n_vectors,
            "input_norm": book.usage.input_norms / book.usage.n_vectors,
            "output_norm": book.usage.output_norms / book.usage.n_vectors,
        }
        for group, want in enumerate(step["per_codebook"]):
            assert int(book.usage.n_vectors) == want["tokens_processed"]
            assert passes[group].tolist() == want["counts"]
            assert fired[group].nonzero().flatten().tolist() == want["codes_triggered"]
            for key, got in of_group.items():
                assert float(got[group]) == pytest.approx(want[key], abs=1e-5)
        whole = step["group"]
        assert round((1 - book.usage.dead_fraction) * whole["num_codes"]) == whole["active_codes"]
        for key, got in of_group.items():
            assert float(got.mean()) == pytest.approx(whole[key], abs=1e-5)
        norms = book.codes.detach().norm(dim=-1)
        assert (float(norms.mean()), float(norms.max())) == pytest.approx((whole["avg_norm"], whole["max_norm"]), abs=1e-5)


PLACE = Address(0, "mlp_out")


@pytest.fixture(scope="module")
def options_case(shared):
    """The case of the options, and a function that runs its codebook, at a hook point, on its input under hooks."""
    case = read_case(shared, "layer/hook_kwargs_ip")
    x = case.data["x"]
    host = make_native_bridge(n_layers=1, d_model=x.shape[-1], n_heads=2, d_head=4, d_mlp=8)
    attach(host, {PLACE.hook_name: book_of(case)})
    feed = (f"{PLACE.hook_name}.hook_x", lambda value, hook: x)
    tokens = torch.zeros(x.shape[:2], dtype=torch.long)

    @torch.no_grad()
    def run(hooks: list[Hook]) -> Any:
        with host.hooks(fwd_hooks=[feed, *hooks]):
            return host.run_with_cache(tokens)[1]

    return case, run


@pytest.mark.filterwarnings("ignore:an intervention at no position")
@pytest.mark.parametrize("index", range(146))
def test_options(options_case, index):
    case, run = options_case
    assert [item["i"] for item in case.spec["runs"]] == list(range(146))
    options = case.spec["runs"][index]["kwargs"]
    assert set(options) <= set(DEFAULTS)
    codes = options.get("disable_codes")
    cache = run(option_hooks(run, {PLACE: options | {"disable_codes": [codes] if codes else []}}))
    assert_ids(cache[f"{PLACE.hook_name}.hook_codes"], case.data[f"{index}/ids"], PLACE)
    assert_floats(cache[PLACE.hook_name], case.data[f"{index}/out"], atol=1e-5)
