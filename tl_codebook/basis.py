"""The basis that codes live in, and the check that a model still has it.

Weight processing (folding LayerNorms, centring writing weights) leaves the logits of a model alone and moves its activations; codes trained
before then mean nothing afterwards. A fingerprint is the mean raw activation per site on a fixed probe: it differs by less than 1e-4 in the
same basis and by more than 1e-2 in another.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook import hosts
from tl_codebook.attachment import sites
from tl_codebook.contexts import bypassed
from tl_codebook.errors import BasisMismatchError, BasisWarning
from tl_codebook.names import split_hook_name

__all__ = ["Basis", "fingerprint", "vocabulary_hash"]

_TOLERANCE = 2e-3
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
    means: dict[str, Float[Tensor, " d_in"]]
    """Mean raw activation per hook name on `tokens`."""
    processing: dict[str, bool] = field(default_factory=dict)
    vocabulary: str | None = None

    def check(self, model: Any, names: Iterable[str]) -> None:
        """Raise where the model is in another basis than the codes for `names`; warn where it is only another model of the same kind.

        Raises:
            BasisMismatchError: another vocabulary, another width, or weights processed differently.
        """
        names = [name for name in names if name in self.means]
        vocabulary = vocabulary_hash(model)
        if int(self.tokens.max()) >= model.cfg.d_vocab or (vocabulary and self.vocabulary and vocabulary != self.vocabulary):
            raise BasisMismatchError(
                "these codes were trained with another tokenizer than this model's, so their ids would mean other texts. Load the model "
                "that they were trained on."
            )
        now = fingerprint(model, names, self.tokens)
        wrong = {}
        for name in names:
            then, seen = self.means[name], now.means[name]
            if then.shape != seen.shape:
                raise BasisMismatchError(
                    f"{name!r}: the codes were trained on {then.numel()} values a position, this model has {seen.numel()}. Load the model "
                    "that they were trained on."
                )
            difference = float((then - seen).norm() / then.norm().clamp(min=1e-8))
            if not difference <= _TOLERANCE:
                wrong[name] = difference
        if not wrong:
            return
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
        if flags or now_on.get("processed", False) != then_on.get("processed", False):
            more = any(now_on[name] for name in flags) or now_on.get("processed", False)
            have = "this model's weights were processed" if more else "the codes come from processed weights"
            how = ", ".join(flags) or "enable_compatibility_mode()"
            return f"{have} ({how}), which moves z and v where there are value biases (fold_value_biases)"
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
    means = {name: value.float().flatten(0, 1 if value.ndim > 2 else 0).mean(0).flatten().cpu() for name, value in found.items()}
    return Basis(tokens.cpu(), means, hosts.processing(model), vocabulary_hash(model))
