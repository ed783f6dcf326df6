"""The basis that codes live in, and the check that a model still has it.

Weight processing (folding LayerNorms, centring writing weights) leaves the logits of a model alone and moves its activations; codes trained
before then mean nothing afterwards. A fingerprint is the mean raw activation per site on a fixed probe: it differs by less than 1e-4 in the
same basis and by more than 1e-2 in another.

At z and v the folding of value biases only subtracts a constant, so that codes stay exact between an added and a subtracted offset. That
the difference is such a constant is read off the spread of the activations, which no constant changes and other weights do: on tiny
GPT-2, NeoX and GPT-Neo it moves by 1e-7 of what the mean moves where value biases were folded, by more than 0.2 under noise on the weights.

Half precision proves no such constant: rounding alone moves the spread by up to 8e-3 of what the mean moves. What looks like one there is
refused, since an offset at some sites and none at others would be worse than either.
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

__all__ = ["Basis", "fingerprint", "measured", "vocabulary_hash"]

_TOLERANCE = 2e-3
_ROUNDING = {"bfloat16": 2e-2, "float16": 5e-3}
"""How much the mean may move in half precision. Measured, tiny models against themselves in float32: bfloat16 up to 9e-3, float16 1e-3."""
_LOOKS_CONSTANT = 0.05
"""How much the spread may move under what looks like a constant in half precision, as the two shares below. Measured with value biases
folded there: up to 4e-3 of itself and 8e-3 of what the mean moves (float16: 1e-3); under noise on the weights over 0.2 of the latter."""
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
    """What weight processing had done to the model that was measured, and which half precision (`bfloat16`, `float16`) it ran in."""
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
        offsets = self.compare(fingerprint(model, names, self.tokens), names)
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

    def compare(self, now: Basis, names: Iterable[str]) -> dict[str, Float[Tensor, " _"]]:
        """Return the offsets of `check` for a model that was measured on the same tokens; warn where the weights are others.

        Raises:
            BasisMismatchError: another width, weights processed in a way that cannot be undone, or that half precision cannot prove.
        """
        wrong, offsets, tolerance = {}, {}, self._tolerance(now)
        for name in names:
            then, seen = self.means[name], now.means[name]
            if then.shape != seen.shape:
                raise BasisMismatchError(
                    f"{name!r}: the codes were trained on {then.numel()} values a position, this model has {seen.numel()}. Load the model "
                    "that they were trained on."
                )
            difference = float((then - seen).norm() / then.norm().clamp(min=1e-8))
            if difference <= tolerance:
                continue
            if split_hook_name(name)[1] in _SHIFTED_SITES and self._shifted_only(now, name):
                offsets[name] = then - seen
            else:
                wrong[name] = difference
        if wrong:
            self._refuse_or_warn(now, wrong, offsets)
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

    def _shifted_only(self, now: Basis, name: str, of_itself: float = _SPREAD_TOLERANCE, of_move: float = _SPREAD_SHARE) -> bool:
        """Say whether the activations moved by a constant: their spread stands still, by itself and against what the mean moved."""
        moved = float((self.means[name] - now.means[name]).norm())
        spread = float((self.spreads[name] - now.spreads[name]).norm())
        return spread <= min(of_itself * float(self.spreads[name].norm()), of_move * moved)

    def _tolerance(self, now: Basis) -> float:
        return max([_TOLERANCE, *(limit for dtype, limit in _ROUNDING.items() if self.processing.get(dtype) or now.processing.get(dtype))])

    def _may_be_folded(self, now: Basis) -> bool:
        """Say whether value biases may have been folded on one side only; of a Bridge and of Hugging Face nobody knows."""
        then_on, now_on = self.processing, now.processing
        if then_on.get("processed", False) != now_on.get("processed", False):
            return True
        folded = [on["fold_value_biases"] for on in (then_on, now_on) if "fold_value_biases" in on]
        return folded in ([True], [True, False], [False, True])

    def _refuse_unproven(self, now: Basis, wrong: Mapping[str, float], offsets: Mapping[str, Tensor]) -> None:
        """Raise where half precision hides whether z or v moved by a constant."""
        dtype = next((dtype for dtype in _ROUNDING if self.processing.get(dtype) or now.processing.get(dtype)), None)
        if dtype is None or not self._may_be_folded(now):
            return
        for name in wrong:
            alike = self._shifted_only(now, name, _LOOKS_CONSTANT, _LOOKS_CONSTANT)
            if split_hook_name(name)[1] not in _SHIFTED_SITES or not (alike or offsets):
                continue
            if any(self.processing.get(each) for each in _ROUNDING):
                how = "Attach these codes in float32 to the model that they were trained on, save them again, and use those"
            else:
                how = "Load the model in float32, attach the codes, then cast it"
            raise BasisMismatchError(
                f"the mean activation at {name!r} differs by {wrong[name]:.1%} from that of the model the codes were trained on: folded "
                f"value biases would make up such a constant, and {dtype} is too coarse to prove that it is one. {how}: float32 proves it. "
                "Or load the model without weight processing, if the codes were trained without."
            )

    def _refuse_or_warn(self, now: Basis, wrong: dict[str, float], offsets: Mapping[str, Tensor]) -> None:
        worst = max(wrong, key=lambda name: wrong[name])
        text = f"the mean activation at {worst!r} differs by {wrong[worst]:.1%} from that of the model the codes were trained on"
        cause = self._centred(now, wrong)
        if not cause:
            self._refuse_unproven(now, wrong, offsets)
            cause = self._processed(now)
        if cause:
            raise BasisMismatchError(
                f"{text}: {cause}. Load the model without weight processing (HookedTransformer.from_pretrained_no_processing, or a "
                "TransformerBridge without enable_compatibility_mode), or train codes on the processed model."
            )
        warnings.warn(f"{text}: other weights (a fine-tuned base?). The codes are attached; check the loss.", BasisWarning, stacklevel=5)

    def _centred(self, now: Basis, wrong: dict[str, float]) -> str:
        tolerance = self._tolerance(now)
        for name in wrong:
            then, seen = self.means[name], now.means[name]
            if split_hook_name(name)[1] in _CENTRED_SITES:
                for before, after, what in ((then, seen, "has"), (seen, then, "lacks")):
                    centred = before - before.mean()
                    left = float((centred - after).norm() / centred.norm().clamp(min=1e-8))
                    if left <= tolerance and left < wrong[name] / 2:
                        return f"this model {what} centred writing weights (center_writing_weights)"
        return ""

    def _processed(self, now: Basis) -> str:
        then_on, now_on = self.processing, now.processing
        same = {"processed", *_ROUNDING}
        flags = [name for name in now_on if name not in same and now_on[name] != then_on.get(name, now_on[name])]
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
    return measured(found, tokens.cpu(), hosts.processing(model), vocabulary_hash(model))


def measured(found: Mapping[str, Tensor], tokens: Tensor, processing: Mapping[str, bool], vocabulary: str | None) -> Basis:
    """Return the basis of a model whose raw activations on `tokens` are known by hook name."""
    means, spreads = {}, {}
    for name, value in found.items():
        rows = value.cpu().double().flatten(0, 1 if value.ndim > 2 else 0).flatten(1)
        means[name], spreads[name] = rows.mean(0), rows.std(0, correction=0)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in found.values()}
    return Basis(tokens, means, spreads, {**processing, **{dtype: dtype in dtypes for dtype in _ROUNDING}}, vocabulary)
