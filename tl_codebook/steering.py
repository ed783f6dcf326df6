"""Hold interventions on a model for the length of a ``with`` block, through generation too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook import hosts
from tl_codebook.attachment import sites
from tl_codebook.errors import ConfigError, HookNeverFiredError
from tl_codebook.names import CODES

__all__ = ["run_rows", "steer"]

_GENERATORS = ("generate", "generate_stream", "hf_generate")


class _Counted:
    """A user's hook function, and whether it was ever called."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.n_applied = 0

    def __call__(self, value: Any, hook: Any) -> Any:
        self.n_applied += 1
        return self.function(value, hook=hook)


@contextmanager
def steer(model: Any, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[Any]:
    """Hold hooks on the model inside the ``with`` block, and raise at its end if one of them never did anything.

    Names, codes and groups are checked before the first one is added. Inside the block positions are absolute with and without a KV cache,
    negative ones count from the end of the prompt, and `prompt_only` and `generated_only` know which is which in `generate`. The hooks
    survive `run_with_hooks` and `reset_hooks()`; those that were there before stay.

    Args:
        model: A host with codebooks.
        hooks: What `fwd_hooks` takes: pairs of hook name and function, from `force_code` and its kin or the user's own.

    Raises:
        UnknownHookError: a hook name that does not exist.
        HookNeverFiredError: at the end of the block, for a hook that was never reached or whose positions never came.

    >>> from tl_codebook import attach, force_code
    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> with steer(model, [force_code("L1.mlp_out:3", pos=-1)]):
    ...     _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    >>> cache["blocks.1.hook_mlp_out.hook_codes"][0, -1].tolist()
    [3]
    """
    model = hosts.as_host(model)
    registry, points = model.hook_dict, sites(model)
    todo = []
    for item in hooks:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and callable(item[1])):
            raise ConfigError(f"{item!r} is not a pair of hook name and function, which is what force_code and its kin return.")
        name, function = item
        if name not in list(registry):  # list: the registry of a Bridge may raise on its own
            raise hosts.unknown_hook(model, name)
        if hasattr(function, "check"):
            if name.removesuffix(f".{CODES}") not in points:
                raise hosts.unknown_hook(model, f"{name}.{CODES}")
            function.check(points[name.removesuffix(f".{CODES}")].codebook)
        todo.append((name, registry[name], function if hasattr(function, "n_applied") else _Counted(function)))
    before = [function.n_applied for _, _, function in todo]
    clock = hosts.PositionClock.of(model)
    added = []
    try:
        for _, point, function in todo:
            point.add_hook(function, is_permanent=True)
            added.append((point, point.fwd_hooks[-1]))
        with _generation_noticed(model, clock):
            yield model
    finally:
        lost = [point.name for point, handle in added if handle not in point.fwd_hooks]
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
        if not points:
            hosts.PositionClock.remove(model)
    if lost:
        raise HookNeverFiredError(
            f"the hook at {lost[0]!r} was removed inside the block (reset_hooks(including_permanent=True)?), so that what followed ran "
            "without it."
        )
    for (name, _, function), count in zip(todo, before, strict=True):
        if function.n_applied == count and not getattr(function, "empty", False):
            raise HookNeverFiredError(
                f"{function!r} at {name!r} never acted: the model did not run inside the block, or never came to the positions asked for."
                if hasattr(function, "check")
                else f"the hook at {name!r} was never called. Run the model inside the block, or choose a hook point that fires."
            )


@contextmanager
def _generation_noticed(model: Any, clock: hosts.PositionClock) -> Iterator[None]:
    """Tell the clock when `generate` starts: without a KV cache its steps look like sequences of their own."""
    names = [name for name in _GENERATORS if callable(getattr(type(model), name, None))]
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    for name in names:
        model.__dict__[name] = _noticed(getattr(model, name), clock)
    try:
        yield
    finally:
        for name in names:
            del model.__dict__[name]
        model.__dict__.update(before)


def _noticed(method: Callable[..., Any], clock: hosts.PositionClock) -> Callable[..., Any]:
    @functools.wraps(method)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with clock.generation():
            result = method(*args, **kwargs)
        if not inspect.isgenerator(result):
            return result
        return _streamed(result, clock)

    return generate


def _streamed(stream: Iterator[Any], clock: hosts.PositionClock) -> Iterator[Any]:
    with clock.generation():
        yield from stream


def run_rows(model: Any, tokens: Int[Tensor, "row pos"], hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Tensor:
    """Return the logits of one pass, in evaluation mode and without gradients; a hook that never acts raises."""
    host = hosts.as_host(model)
    tokens = tokens.to(hosts.home_device(host, "hook_embed"))
    with hosts.evaluating(host), torch.no_grad():
        if not hooks:
            return host(tokens)
        with steer(host, hooks):  # unlike run_with_hooks, it raises where a hook does nothing
            return host(tokens)
