"""The basis that codes live in, and the check that a model still has it.

Weight processing (folding LayerNorms, centring writing weights) leaves the logits of a model alone and moves its activations; codes trained
before then mean nothing afterwards. A fingerprint is the mean raw activation per site on a fixed probe: it differs by less than 1e-4 in the
same basis and by more than 1e-2 in another.

At z and v the folding of value biases only subtracts a constant, so that codes stay exact between an added and a subtracted offset. That
the difference is such a constant is read off the spread of the activations, which no constant changes and other weights do: on tiny
GPT-2, NeoX and GPT-Neo it moves by 1e-7 of what the mean moves where value biases were folded, by more than 0.2 under noise on the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook import hosts
from tl_codebook.attachment import sites
from tl_codebook.contexts import bypassed
from tl_codebook.errors import BasisMismatchError, BasisWarning, CheckpointError
from tl_codebook.names import split_hook_name

__all__ = ["Basis", "fingerprint", "vocabulary_hash"]

_TOLERANCE = 2e-3
_SPREAD_TOLERANCE = 2e-4
_SPREAD_SHARE = 0.01
"""How much the spread may move under a constant shift, as a share of itself and as a share of what the mean moves."""
_SHIFTED_SITES = ("z", "v")
_CENTRED_SITES = ("attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "resid_delta")


def vocabulary_hash(model: Any) -> str | None:
    """Return a hash of the tokenizer's vocabulary, or None without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@dataclass(frozen=True)
class Basis:
    """Where codes were trained: what the model's activations looked like there."""

    tokens: Int[Tensor, "batch pos"]
    means: dict[str, Float[Tensor, " _"]]
    """Mean raw activation per hook name on `tokens`, each as wide as its site."""
    spreads: dict[str, Float[Tensor, " _"]]
    """Standard deviation of the raw activation per hook name on `tokens`: what a constant shift leaves alone."""
    processing: dict[str, bool]
    """What weight processing had done to the model that was measured."""
    vocabulary: str | None

    def check(self, model: Any, names: Iterable[str]) -> dict[str, Float[Tensor, " _"]]:
        """Return what to add to the activations of `names` to bring them into this basis; warn of it, or where the weights are others.

        Only z and v have an offset, and only where it is proven to be a constant: weights with their value biases folded.

        Raises:
            BasisMismatchError: another vocabulary, another width, or weights processed in a way that cannot be undone.
        """
        names = [name for name in names if name in self.means]
        vocabulary = vocabulary_hash(model)
        if int(self.tokens.max()) >= model.cfg.d_vocab or (vocabulary and self.vocabulary and vocabulary != self.vocabulary):
            raise BasisMismatchError(
                "these codes were trained with another tokenizer than this model's, so their ids would mean other texts. Load the model "
                "that they were trained on."
            )
        now = fingerprint(model, names, self.tokens)
        wrong, offsets = {}, {}
        for name in names:
            then, seen = self.means[name], now.means[name]
            if then.shape != seen.shape:
                raise BasisMismatchError(
                    f"{name!r}: the codes were trained on {then.numel()} values a position, this model has {seen.numel()}. Load the model "
                    "that they were trained on."
                )
            difference = float((then - seen).norm() / then.norm().clamp(min=1e-8))
            if difference <= _TOLERANCE:
                continue
            if split_hook_name(name)[1] in _SHIFTED_SITES and self._shifted_only(now, name):
                offsets[name] = then - seen
            else:
                wrong[name] = difference
        if wrong:
            self._refuse_or_warn(now, wrong)
        if offsets:
            first, more = next(iter(offsets)), len(offsets) - 1
            warnings.warn(
                f"the activations at {first!r}{f' and {more} more' if more else ''} differ by a constant from those that the codes were "
                "trained on, as folded value biases make them. The codebooks there add it before the snap and subtract it after, which is "
                "exact; nothing is left to do.",
                BasisWarning,
                stacklevel=3,
            )
        return offsets

    def shifted(self, offsets: Mapping[str, Tensor]) -> Basis:
        """Return the basis of codes that are held in theirs by offsets in the model that was measured."""
        moved = {name: self.means[name] + offset.flatten().cpu().double() for name, offset in offsets.items()}
        return dataclasses.replace(self, means=self.means | moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return the measurements by their names in a checkpoint."""
        return {
            "basis/tokens": self.tokens,
            **{f"basis/mean/{name}": mean for name, mean in self.means.items()},
            **{f"basis/spread/{name}": spread for name, spread in self.spreads.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any], widths: Mapping[str, int], where: Any) -> Basis:
        """Read the measurements back, for codebooks of known widths.

        Raises:
            CheckpointError: something is missing, unknown, of another shape or not finite.
        """
        tokens = tensors.get("basis/tokens")
        if tokens is None or tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel() or int(tokens.min()) < 0:
            raise CheckpointError(f"{where}: its basis has no tokens [row pos]. Copy it again.")
        found: dict[str, dict[str, Tensor]] = {"mean": {}, "spread": {}}
        for key, value in tensors.items():
            _, kind, name = [*key.split("/", 2), "", ""][:3]
            if key == "basis/tokens":
                continue
            if kind not in found or not name:
                raise CheckpointError(f"{where}: its basis has an unknown tensor {key!r}. Copy it again.")
            if not value.is_floating_point() or value.ndim != 1 or value.numel() != widths.get(name, value.numel()):
                raise CheckpointError(
                    f"{where}: its basis has {value.dtype} {tuple(value.shape)} as the {kind} at {name!r}. Copy it again."
                )
            if not bool(torch.isfinite(value).all()) or (kind == "spread" and bool((value < 0).any())):
                raise CheckpointError(f"{where}: its basis at {name!r} holds a {kind} that no activations have. Copy it again.")
            found[kind][name] = value.double()
        means, spreads = found["mean"], found["spread"]
        odd = sorted(n for n in means | spreads if n not in means or n not in spreads or means[n].shape != spreads[n].shape)
        if odd:
            raise CheckpointError(f"{where}: its basis needs a mean and a spread of one width for each site, unlike {odd}. Copy it again.")
        return cls(tokens, means, spreads, dict(about["processing"]), about["vocabulary"])

    def _shifted_only(self, now: Basis, name: str) -> bool:
        """Say whether the activations moved by a constant: their spread stands still, by itself and against what the mean moved."""
        moved = float((self.means[name] - now.means[name]).norm())
        spread = float((self.spreads[name] - now.spreads[name]).norm())
        return spread <= min(_SPREAD_TOLERANCE * float(self.spreads[name].norm()), _SPREAD_SHARE * moved)

    def _refuse_or_warn(self, now: Basis, wrong: dict[str, float]) -> None:
        worst = max(wrong, key=lambda name: wrong[name])
        text = f"the mean activation at {worst!r} differs by {wrong[worst]:.1%} from that of the model the codes were trained on"
        cause = self._cause(now, wrong)
        if cause:
            raise BasisMismatchError(
                f"{text}: {cause}. Load the model without weight processing (HookedTransformer.from_pretrained_no_processing, or a "
                "TransformerBridge without enable_compatibility_mode), or train codes on the processed model."
            )
        warnings.warn(f"{text}: other weights (a fine-tuned base?). The codes are attached; check the loss.", BasisWarning, stacklevel=4)

    def _cause(self, now: Basis, wrong: dict[str, float]) -> str:
        for name in wrong:
            then, seen = self.means[name], now.means[name]
            if split_hook_name(name)[1] in _CENTRED_SITES:
                for before, after, what in ((then, seen, "has"), (seen, then, "lacks")):
                    centred = before - before.mean()
                    if float((centred - after).norm() / centred.norm().clamp(min=1e-8)) <= _TOLERANCE:
                        return f"this model {what} centred writing weights (center_writing_weights)"
        then_on, now_on = self.processing, now.processing
        flags = [name for name in now_on if name != "processed" and now_on[name] != then_on.get(name, now_on[name])]
        # A value bias that is zero or not proves nothing: training moves those that a model came without.
        if set(flags) - {"fold_value_biases"} or now_on.get("processed", False) != then_on.get("processed", False):
            more = any(now_on[name] for name in flags) or now_on.get("processed", False)
            have = "this model's weights were processed" if more else "the codes come from processed weights"
            how = ", ".join(flags) or "enable_compatibility_mode()"
            return f"{have} ({how}), and more has moved than a constant at z and v (folded value biases), which would be made up for"
        return ""


@torch.no_grad()
def fingerprint(model: Any, names: Iterable[str] | None = None, tokens: Int[Tensor, "batch pos"] | None = None) -> Basis:
    """Measure the basis of a model at hook names (those of its codebooks by default), its codebooks bypassed.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> fingerprint(model).means["blocks.0.hook_mlp_out"].shape
    torch.Size([32])
    """
    model = hosts.as_host(model)
    names = list(sites(model)) if names is None else list(names)
    if tokens is None:
        n_pos = min(16, int(getattr(model.cfg, "n_ctx", 16) or 16))
        tokens = (torch.arange(4 * n_pos) * 7919 + 13).remainder(int(model.cfg.d_vocab)).reshape(4, n_pos)
    with bypassed(model):
        found = hosts.raw_activations(model, tokens.to(hosts.home_device(model, "hook_embed")), names)
    means, spreads = {}, {}
    for name, value in found.items():
        rows = value.cpu().double().flatten(0, 1 if value.ndim > 2 else 0).flatten(1)
        means[name], spreads[name] = rows.mean(0), rows.std(0, correction=0)
    return Basis(tokens.cpu(), means, spreads, hosts.processing(model), vocabulary_hash(model))
