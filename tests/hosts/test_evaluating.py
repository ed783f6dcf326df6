"""Evaluation mode for a while: every module in it, and back in its own."""

import pytest
import torch

from tests.hosts.state import TOKENS
from tests.hosts.training import TRAINED, host_of
from tests.tiny import make_host
from tl_codebook import hosts
from tl_codebook.hosts import evaluating
from tl_codebook.training.teacher import BaseTeacher


def modes(model):
    inner = getattr(model, "original_model", None)
    return [module.training for part in (model, inner) if part is not None for module in part.modules()]


@pytest.mark.parametrize("kind", TRAINED)
def test_every_module_evaluates_and_goes_back(kind):
    model = host_of(kind).train()
    model.blocks[0].eval()  # as a user may who wants no dropout there
    before = modes(model)
    assert {True, False} <= set(before)
    with evaluating(model):
        assert not any(modes(model))
        assert torch.is_grad_enabled()
    assert modes(model) == before
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert modes(model) == before


def test_what_has_no_modes():
    with evaluating(lambda tokens: tokens):
        pass


def dropping_bridge():
    """A Bridge around GPT-2 has a dropout after the embeddings that is no module of its own."""
    model = make_host("bridge-gpt2")
    drop = model.original_model.transformer.drop
    assert all(module is not drop for module in model.modules())
    drop.p = 0.5
    return model, drop


def test_a_dropout_beside_the_tree_of_a_bridge_is_off():
    model, drop = dropping_bridge()
    model.eval()
    with torch.no_grad():
        expected = model(TOKENS)
        model.train()
        assert not torch.equal(model(TOKENS), expected)
        with evaluating(model):
            assert torch.equal(model(TOKENS), expected)
    assert drop.training
    name = "blocks.1.hook_resid_post"
    first, second = (hosts.raw_activations(model, TOKENS, [name])[name] for _ in range(2))
    assert torch.equal(first, second)
    assert drop.training


def test_a_teacher_leaves_that_dropout_on():
    """The model's own forward pass of a step comes after the teacher's."""
    model, drop = dropping_bridge()
    model.train()
    BaseTeacher(model).logits(TOKENS)
    assert drop.training
