"""The control from dictionary learning: a TopK sparse autoencoder at equal k and an equal number of latents.

Its latents are numbered as codes are, so that whatever is counted of codes (`code_table`) can be counted of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm.machine import check_range

__all__ = ["TopKDictionary", "train_topk_dictionary"]

_AUXILIARY_WEIGHT = 1 / 32
_VALUES_AT_ONCE = 2**24  # pre-activations held at a time


class TopKDictionary(NamedTuple):
    """A trained TopK autoencoder: ``x ~ bias + sum of value * atom`` over the k latents of the greatest pre-activations."""

    atoms: Float[Tensor, "latent d"]
    """The columns of the decoder, each of norm 1."""
    encoder: Float[Tensor, "latent d"]
    latent_bias: Float[Tensor, " latent"]
    bias: Float[Tensor, " d"]
    """Taken off before the encoder, and added after the decoder."""
    k: int

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != len(self.bias):
            raise ShapeError(f"vectors {list(x.shape)} were given to a dictionary of d={len(self.bias)}. Give [n {len(self.bias)}].")
        if not x.isfinite().all():
            raise DataError("a vector has NaN or Inf, for which no latent is the greatest. Give finite numbers.")

    @torch.no_grad()
    def _activate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        ids, values = [], []
        for rows in x.to(self.bias).split(max(1, _VALUES_AT_ONCE // len(self.atoms))):
            before = _pre_activations(rows, self.encoder, self.latent_bias, self.bias)
            # A stable sort, as `topk` leaves the order of equals open.
            ids.append(before.sort(dim=1, descending=True, stable=True).indices[:, : self.k])
            values.append(before.gather(1, ids[-1]).relu())
        if not ids:
            return torch.empty(0, self.k, dtype=torch.long, device=x.device), x.new_empty(0, self.k)
        return torch.cat(ids), torch.cat(values)

    def encode(self, x: Float[Tensor, "n _"]) -> Int[Tensor, "n k"]:
        """Return the k latents of the greatest pre-activations, greatest first, equals by lowest id.

        One whose pre-activation is not above 0 is silenced by the ReLU: its slot is empty (-1).

        Raises:
            DataError: NaN or Inf.
            ShapeError: vectors of another length.
        """
        ids, values = self._activate(x)
        return ids.masked_fill(values == 0, -1)

    def values(self, x: Float[Tensor, "n _"]) -> Float[Tensor, "n k"]:
        """Return how active the latents of `encode` are; 0 in an empty slot.

        Raises:
            DataError: NaN or Inf.
            ShapeError: vectors of another length.
        """
        return self._activate(x)[1]

    def decode(self, ids: Int[Tensor, "n slot"], values: Float[Tensor, "n slot"]) -> Float[Tensor, "n d"]:
        """Return the vectors that latents of these values stand for; an id below 0 adds nothing.

        Raises:
            DataError: an id that is no latent.
        """
        wrong = ids[ids >= len(self.atoms)]
        if wrong.numel():
            raise DataError(f"latent {int(wrong[0])} was given, but there are {len(self.atoms)}. Give 0 to {len(self.atoms) - 1}, or -1.")
        weights = values.masked_fill(ids < 0, 0).to(self.atoms)
        out = self.bias.repeat(len(ids), 1)
        for slot in range(ids.shape[1]):  # one slot at a time: [n slot d] may be large
            out += weights[:, slot, None] * self.atoms[ids[:, slot].clamp(min=0)]
        return out

    def reconstruct(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return what the dictionary makes of vectors.

        Raises:
            DataError: NaN or Inf.
            ShapeError: vectors of another length.
        """
        return self.decode(*self._activate(x))

    def unexplained(self, x: Float[Tensor, "n _"]) -> float:
        """Return the squared error as a share of the squared distance to the mean of `x`: 0 is perfect, 1 no better than the mean.

        Raises:
            DataError: vectors that are all alike, or none; NaN or Inf.
            ShapeError: vectors of another length.
        """
        self._check(x)
        spread = (x - x.mean(0)).double().square().sum() if len(x) else torch.zeros(())
        if not float(spread):
            raise DataError(f"{len(x)} vectors without any variance were given, of which no share is unexplained. Give different ones.")
        return float((x - self.reconstruct(x)).double().square().sum() / spread)


def _pre_activations(x: Tensor, encoder: Tensor, latent_bias: Tensor, bias: Tensor) -> Tensor:
    return (x - bias) @ encoder.T + latent_bias


def _spread(ids: Tensor, values: Tensor, n_latents: int) -> Tensor:
    return values.new_zeros(len(values), n_latents).scatter(1, ids, values.relu())


@torch.enable_grad()
def train_topk_dictionary(
    x: Float[Tensor, "n d"],
    n_latents: int,
    k: int,
    *,
    steps: int,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    dead_after: int | None = None,
    seed: int = 0,
) -> TopKDictionary:
    """Train a TopK sparse autoencoder on vectors; the same for the same seed, and torch's global random state is left alone.

    As in the source: atoms start as random directions and stay of norm 1 (the gradient along them is taken off), the encoder starts as
    their transpose, Adam trains both, with the biases. Latents that have been silent for `dead_after` steps are trained, d / 2 of them at
    a time, to make up the error that the others leave (AuxK, weight 1 / 32, normalised by that error).
    Other than in the source: the bias starts at the mean (there: the geometric median), the vectors are scaled by one number for training
    (there: each to norm 1; codes see them unscaled too), the learning rate falls to 0 over the last fifth, gradients are clipped to norm 1
    (there: an option), and weights are not averaged over steps.

    Args:
        x: What to explain, on the device to train on.
        n_latents: Size of the dictionary, >= 1.
        k: Latents that are active together, 1 to `n_latents`.
        steps: Batches, >= 1.
        batch_size: Vectors of a batch, >= 1, drawn in epochs.
        learning_rate: Of Adam, above 0, for vectors of unit variance.
        dead_after: Steps without firing after which a latent counts as dead, >= 1; by default a hundredth of `steps`, and 10 at least.
        seed: Of the start and of the order of batches.

    Raises:
        ConfigError: a number out of range.
        DataError: vectors that are all alike, or none; NaN or Inf.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2 and appendix A.

    >>> x = torch.eye(4)[torch.arange(64) % 4] * 3
    >>> dictionary = train_topk_dictionary(x, n_latents=8, k=1, steps=300, batch_size=16, learning_rate=0.01)
    >>> dictionary.unexplained(x) < 0.01, len(set(dictionary.encode(x[:4]).flatten().tolist()))
    (True, 4)
    """
    dead_after = max(10, steps // 100) if dead_after is None else dead_after
    for name, value in (("n_latents", n_latents), ("k", k), ("steps", steps), ("batch_size", batch_size), ("dead_after", dead_after)):
        check_range(name, value, 1, None, "it counts something that there has to be")
    if k > n_latents:
        raise ConfigError(f"k={k} of {n_latents} latents were asked for. Give k of 1 to {n_latents}.")
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate={learning_rate} was asked for, at which nothing is learnt. Give a number above 0.")
    if not x.isfinite().all():
        raise DataError("a vector has NaN or Inf, and so would every weight after one step. Give finite numbers.")
    x = x.detach().float()
    scale = float((x - x.mean(0)).square().mean().sqrt()) if len(x) else 0.0
    if not scale:
        raise DataError(f"{len(x)} vectors without any variance were given, in which there is nothing to learn. Give different ones.")
    x = x / scale
    generator = torch.Generator().manual_seed(seed)
    atoms = normalize(torch.randn(n_latents, x.shape[1], generator=generator), dim=1).to(x.device).requires_grad_()
    encoder = atoms.detach().clone().requires_grad_()
    latent_bias = x.new_zeros(n_latents, requires_grad=True)
    bias = x.mean(0).requires_grad_()
    weights = [atoms, encoder, latent_bias, bias]
    optimizer = torch.optim.Adam(weights, lr=learning_rate, eps=6.25e-10)
    silent = torch.zeros(n_latents, dtype=torch.long, device=x.device)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        while len(order) < min(batch_size, len(x)):
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        batch, order = x[order[:batch_size].to(x.device)], order[batch_size:]
        loss = _loss(batch, atoms, encoder, latent_bias, bias, k, silent, dead_after)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 5 * (steps - step) / steps)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert atoms.grad is not None
            atoms.grad -= (atoms.grad * atoms).sum(1, keepdim=True) * atoms
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            atoms.copy_(normalize(atoms, dim=1))
    parts = [weight.detach() for weight in weights]
    # In the scale of x again: values grow by the scale, and so do the biases.
    return TopKDictionary(parts[0], parts[1], parts[2] * scale, parts[3] * scale, k)


def _loss(
    batch: Tensor, atoms: Tensor, encoder: Tensor, latent_bias: Tensor, bias: Tensor, k: int, silent: Tensor, dead_after: int
) -> Tensor:
    """Return the loss of a batch, and count in `silent` for how many steps each latent has not fired."""
    before = _pre_activations(batch, encoder, latent_bias, bias)
    values, ids = before.topk(k, dim=1)
    out = _spread(ids, values, len(atoms)) @ atoms + bias
    with torch.no_grad():
        silent += 1
        silent[ids[values > 0]] = 0
        dead = (silent > dead_after).nonzero().flatten()
    loss = (out - batch).square().mean()
    if not len(dead):
        return loss
    error = (batch - out).detach()
    values, places = before[:, dead].topk(min(len(dead), max(1, batch.shape[1] // 2)), dim=1)
    guess = _spread(places, values, len(dead)) @ atoms[dead]
    return loss + _AUXILIARY_WEIGHT * (guess - error).square().mean() / error.square().mean().clamp(min=1e-12)
