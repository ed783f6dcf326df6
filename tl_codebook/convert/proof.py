"""The proof that a host and a Hugging Face model compute the same, with codebooks and without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_codebook import hosts
from tl_codebook.attachment import sites
from tl_codebook.codebook import Codebook
from tl_codebook.convert.huggingface import probe_tokens
from tl_codebook.convert.inside import attach_hf
from tl_codebook.errors import CheckpointError

__all__ = ["Agreement", "compare_with_hf"]


class Agreement(NamedTuple):
    """How far a host and a Hugging Face model agree on a probe."""

    logits: float
    """Largest difference of logits, as a share of their scale."""
    ids: float | None
    """Share of equal ids, 0 to 1; None without codebooks."""
    n_tokens: int


def compare_with_hf(model: Any, hf_model: Any, codes: str | Path | Mapping[str, Codebook] | None) -> Agreement:
    """Run host and Hugging Face model on a probe, their codebooks bypassed and then at work, and raise where they differ.

    Args:
        model: A host.
        hf_model: The same model in Hugging Face; its codebooks are attached for the duration.
        codes: The codes for `hf_model` (as `attach_hf` takes them, not the very objects that the host holds), None without codebooks.

    Raises:
        CheckpointError: logits or ids differ.
    """
    exact = next(hf_model.parameters()).dtype in (torch.float32, torch.float64)
    limit = 1e-4 if exact else 0.1  # bf16: up to 0.03 measured for equal weights, where the two round in another order
    tokens = probe_tokens(hf_model)
    with torch.no_grad():
        difference = _compare(_run(model, tokens, codes=False)[0], hf_model(tokens).logits, limit, "without codebooks")
        if codes is None:
            return Agreement(difference, None, tokens.numel())
        logits, ids = _run(model, tokens, codes=True)
        # The host's ids are decoded in Hugging Face too. One near tie may fall otherwise on either side, and would change all that follows;
        # so every site is asked for its choice, given the same choices before it.
        with attach_hf(hf_model, codes) as inside:
            for name, snap in inside.snaps.items():
                snap.forced = ids[name]
            difference = max(difference, _compare(logits, hf_model(tokens).logits, limit, "with the host's codes"))
            equal = float(torch.cat([(ids[name] == chosen).flatten() for name, chosen in inside.ids.items()]).double().mean())
        if set(inside.ids) != set(ids):
            raise CheckpointError(f"no codes were chosen at {sorted(set(ids) - set(inside.ids))} inside Hugging Face. Nothing was written.")
        if exact and equal < 0.999:  # in half precision the two round differently, and ties are many
            raise CheckpointError(
                f"inside Hugging Face only {equal:.2%} of the codes are those of the host (at least 99.9% were expected). "
                "Nothing was written."
            )
    return Agreement(difference, equal, tokens.numel())


def _run(model: Any, tokens: Tensor, *, codes: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the host as in evaluation, the user's hooks set aside and nothing counted; return logits and ids by hook name."""
    points, ids = sites(model), dict[str, Tensor]()
    before = [(point, point.enabled, point.codebook.count_when, point.codebook.keep_inputs) for point in points.values()]

    def keeper(name: str) -> Any:
        def keep(value: Tensor, hook: Any) -> None:
            ids[name] = value.clone()

        return keep

    try:
        with hosts.quiet(model):
            for name, point in points.items():
                point.enabled, point.codebook.count_when, point.codebook.keep_inputs = codes, "never", False
                point.hook_codes.add_hook(keeper(name))
            return model(tokens), ids
    finally:
        for point, enabled, count_when, keep_inputs in before:
            point.enabled, point.codebook.count_when, point.codebook.keep_inputs = enabled, count_when, keep_inputs


def _compare(expected: Tensor, logits: Tensor, limit: float, what: str) -> float:
    expected, logits = expected.float(), logits.float()
    if logits.shape != expected.shape:
        raise CheckpointError(
            f"Hugging Face gives logits {tuple(logits.shape)} {what}, the host {tuple(expected.shape)}. Nothing was written."
        )
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not difference <= limit:
        raise CheckpointError(
            f"{what} Hugging Face's logits differ from the host's by {difference:.2g} of their scale (limit {limit:g}): this "
            "architecture of Hugging Face does not compute what the host does. Keep the model with tl_codebook.save; nothing was written."
        )
    return difference
