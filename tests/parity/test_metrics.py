"""The figures of the codes against those that the original's trainer logs."""

from __future__ import annotations

import pytest
import torch

from tests.parity.golden import read_case
from tests.tiny import HOSTS
from tl_codebook.contexts import count_usage
from tl_codebook.convert.codebook_features import load_codebook_features
from tl_codebook.training import site_figures

FIGURES = {
    "dead_code_fraction": "dead_codes",
    "MSE": "mse",
    "input_norm": "input_norm",
    "output_norm": "output_norm",
    "mean_norm": "mean_code_norm",
    "max_norm": "max_code_norm",
}
"""The original's name -> ours."""
IGNORED = {"loss", "multicode_k"}
"""What the case passes in, and the k that has no effect in the original."""


@pytest.mark.parametrize("host", ["bridge", *(["hooked"] if "hooked" in HOSTS else [])])
@pytest.mark.parametrize("n_passes", [1, 2, 3])
def test_logged_figures(shared, host, n_passes):
    """The original leaves the norms of the codes and everything overall out of an evaluation; ours are the same at both times."""
    case = read_case(shared, "metrics/trainer_log__gpt2__mlp_k5")
    wrap = read_case(shared, "wrap/gpt2__mlp_k5")
    assert case.spec["checkpoint"].endswith("wrap/gpt2__mlp_k5/checkpoint")
    model, books = load_codebook_features(wrap.folder / "checkpoint", shared("golden/bases/gpt2"), host)
    with count_usage(model) as usages, torch.no_grad():
        for index in range(n_passes):
            model(case.data[f"batch{index}"])
    figures = site_figures(usages, books)
    assert list(figures) == ["L0.mlp_out", "L1.mlp_out", "all"]
    compared = {"train": 0, "eval": 0}
    for when in compared:
        for key, want in case.spec["logs"][f"after{n_passes}/{when}"].items():
            theirs, _, layer = key.removeprefix("eval_").partition("/layer")
            if theirs in IGNORED:
                continue
            got = figures[f"L{layer}.mlp_out" if layer else "all"][FIGURES[theirs]]
            assert got == (want if theirs == "dead_code_fraction" else pytest.approx(want, rel=1e-4)), key
            compared[when] += 1
    assert compared == {"train": 18, "eval": 8}
