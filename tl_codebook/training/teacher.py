"""The base as it was when training began: the teacher that `kl_to_base` compares the codebook model with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from tl_codebook.attachment import sites
from tl_codebook.contexts import bypassed
from tl_codebook.hosts import evaluating

__all__ = ["BaseTeacher", "divergence"]


class BaseTeacher:
    """A host without its codebooks and with the weights that it has now, whatever becomes of them.

    It is no second model: for the length of a forward pass the weights of now take the place of those of then. Weights that cannot move
    (`requires_grad` is false, and none that can shares their memory) are not copied. Buffers are taken as they are.

    Hooks on the model run in its passes too, except those inside a codebook: under training with a teacher they run twice a step.

    >>> from tl_codebook import attach
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> before = model(tokens)
    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> teacher = BaseTeacher(model)
    >>> _ = next(model.requires_grad_(False).parameters()).add_(1)
    >>> torch.equal(teacher.logits(tokens), before)
    True
    """

    def __init__(self, hooked: Any):
        self.hooked = hooked
        own = {id(parameter) for point in sites(hooked).values() for parameter in point.codebook.parameters()}
        base = [parameter for parameter in hooked.parameters() if id(parameter) not in own]
        self.digest = _digest(base)
        """Hash of the weights, by which a resumed run tells another base."""
        copies = {_place(parameter): parameter.untyped_storage().clone() for parameter in base if parameter.requires_grad}
        # By storage, with the strides of the original: tied and fused weights (q, k and v of GPT-2 on a Bridge are views of one matrix)
        # are copied once, and a product adds up its terms in the same order.
        self._weights = [
            (parameter, _view(copies[_place(parameter)], parameter.detach())) for parameter in base if _place(parameter) in copies
        ]

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch pos"], **kwargs: Any) -> Float[Tensor, "batch pos vocabulary"]:
        """Run the base in evaluation mode; `kwargs` go to the host. Everything is as before afterwards, whatever happens."""
        with evaluating(self.hooked), _uncached_autocast(), bypassed(self.hooked), self._in_place():
            logits: Tensor = self.hooked(tokens, return_type="logits", **kwargs)
        return logits

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        # `.data` of a parameter is a tensor of its own over the same memory: it keeps storage, offset and strides of a view.
        moved = [(parameter, parameter.data) for parameter, _ in self._weights]
        try:
            for parameter, weight in self._weights:
                parameter.data = weight
            yield
        finally:
            for parameter, weight in moved:
                parameter.data = weight


def divergence(base: Float[Tensor, "n vocabulary"], model: Float[Tensor, "n vocabulary"]) -> Float[Tensor, ""]:
    """Return KL(base || model) of the distributions that two sets of logits mean, in nats, summed over the rows.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))  # (ln(1 + e) - ln 2) - 1/2
    tensor(0.1201)
    """
    return kl_div(model.float().log_softmax(-1), base.float().log_softmax(-1), reduction="sum", log_target=True)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    # Autocast keeps the cast of a parameter until its outermost block ends: the pass that follows would compute with the teacher's, which
    # has no gradient.
    before = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _place(parameter: Tensor) -> tuple[Any, int]:
    return parameter.device, parameter.untyped_storage().data_ptr()


def _view(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    return like.new_empty(0).set_(storage, like.storage_offset(), like.shape, like.stride())


def _digest(parameters: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
