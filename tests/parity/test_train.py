"""Five AdamW steps against the original's training: losses, codes, norms and logits.

Only on a Bridge: its embedding and unembedding are one tied parameter, as in Hugging Face's GPT-2, which the original trained. A
HookedTransformer has two, and after one step they differ; that is another model, not another way to compute this one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.golden import assert_floats, read_case
from tl_codebook.convert.codebook_features import load_codebook_features
from tl_codebook.names import hook_name
from tl_codebook.training import CodebookTrainingConfig, parameter_groups
from tl_codebook.training.losses import LanguageModel

RECIPE = CodebookTrainingConfig.paper()


@pytest.fixture
def case(shared):
    return read_case(shared, "train/gpt2__mlp_k5__adamw5")


def untrained(case: Any, shared: Any) -> tuple[Any, Any]:
    """The base with the codebooks of the case, and the tokens for the logits after training."""
    wrap = read_case(shared, "wrap/gpt2__mlp_k5")
    model, _ = load_codebook_features(wrap.folder / "checkpoint", shared("golden/bases/gpt2"), "bridge")
    return model.train(), wrap.data["input_ids"]


def groups_of(model: Any, settings: Any, run: str) -> list[dict[str, Any]]:
    """The optimiser's groups; `reference` leaves out the LayerNorms of the codebooks, which the original forgets."""
    rate = settings["lr"]
    groups = parameter_groups(
        model, codes_learning_rate=rate, learning_rate=rate * settings["model_lr_factor"], weight_decay=settings["weight_decay_model"]
    )
    if run == "reference":
        norms = [id(p) for name, p in model.named_parameters() if "norm_" in name and ".codebook." in name]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in norms]
    return groups


def language_model_loss(out: Any) -> float:
    """The loss without the reconstruction: the original adds its gradient to the codes, and leaves its value out."""
    loss, tokens, _ = out["sums"].sum(0).tolist()
    return loss / tokens


@pytest.mark.parametrize("run", ["live_params", "reference"])
def test_five_steps(case, shared, run):
    model, probe = untrained(case, shared)
    settings, expected = case.spec["optimizer"], case.spec["runs"][run]
    groups = groups_of(model, settings, run)
    assert settings["name"] == "AdamW"
    assert settings["weight_decay_codebook"] == groups[0]["weight_decay"]
    assert len(groups[0]["params"]) == expected["groups"][0]["n"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(g["lr"], g["weight_decay"]) for g in expected["groups"]]
    # Not the fused kernel: q, k and v of the Bridge are views of one matrix, and it takes a view for a block of memory of its own.
    optimizer = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), eps=settings["eps"], fused=False)
    trained = LanguageModel(model, RECIPE)
    losses = []
    for step in range(case.spec["steps"]):
        batch = case.data[f"batch{step}"]
        optimizer.zero_grad()
        out = trained(batch, labels=batch)
        out["loss"].backward()
        optimizer.step()
        losses.append(language_model_loss(out))
    model.eval()
    for layer in range(2):
        book = model.hook_dict[hook_name(layer, "mlp_out")].codebook
        prefix = f"{run}/layer{layer}_mlp/"
        assert_floats(book.codes[0], case.data[f"{prefix}codebook.weight"], atol=1e-5)
        assert_floats(book.norm_weight[0], case.data[f"{prefix}ln.weight"], atol=1e-5)
        assert_floats(book.norm_bias[0], case.data[f"{prefix}ln.bias"], atol=1e-5)
    with torch.no_grad():
        logits = model(probe)
        losses.append(language_model_loss(trained.eval()(probe, labels=probe)))
    assert_floats(logits, case.data[f"{run}/logits_after"], atol=1e-4)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor([*expected["losses"], expected["loss_after"]]), rtol=0, atol=1e-4)
