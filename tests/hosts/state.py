"""What a model looks like from outside and inside, so that a test can say: nothing was left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_codebook.hosts import is_bridge
from tl_codebook.names import SITES, hook_name

TOKENS = torch.tensor([[5, 9, 33, 12, 60, 3, 7], [4, 4, 21, 58, 17, 40, 11]])
"""Two sequences for every comparison of a model with itself."""


def available(model: Any) -> list[str]:
    """The sites that the model has."""
    return [site for site in SITES if site == "resid_delta" or hook_name(0, site) in model.hook_dict]


def distinct(model: Any) -> list[str]:
    """The sites that the model has, without those that are another one's hook point (Mixtral: post is mlp_out)."""
    chosen: dict[int, str] = {}
    for site in available(model):
        chosen.setdefault(id(model.hook_dict.get(hook_name(0, site), site)), site)
    return list(chosen.values())


def state_of(model: Any, logits: bool = True) -> dict[str, Any]:
    """Everything that this package could change in a model, by identity where the object matters and by value elsewhere."""
    points = {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}
    state: dict[str, Any] = {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "hook_dict": [(name, id(point)) for name, point in model.hook_dict.items()],
        "attributes of the model": sorted(set(vars(model)) - {"_hook_cache", "_hook_alias_registry"}),
        "attributes of the hook points": {name: sorted(vars(point)) for name, point in points.items()},
        "names of the hook points": {name: point.name for name, point in points.items()},
        "hooks": {
            name: [*map(id, point.fwd_hooks), *map(id, point.bwd_hooks), *point._forward_hooks, *point._backward_hooks]
            for name, point in points.items()
        },
        "hooks of the blocks": [[*map(id, b._forward_pre_hooks.values()), *b._forward_pre_hooks_with_kwargs] for b in model.blocks],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "state_dict": {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)},
    }
    if is_bridge(model):
        state["registry"] = type(model._hook_registry)
    if logits:
        with torch.no_grad():
            state["logits"] = model(TOKENS)
    return state


def assert_same_state(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    for part in before:
        if part == "state_dict":
            assert list(after[part]) == list(before[part])
            assert all(_equal(after[part][name], value) for name, value in before[part].items())
        elif part == "logits":
            assert torch.equal(after[part], before[part])
        else:
            assert after[part] == before[part], part


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
