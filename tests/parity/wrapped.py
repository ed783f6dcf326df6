"""Whole models against the original's: what `load_codebook_features` makes of a checkpoint, in the words of a golden case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tests.parity.golden import read_key
from tests.parity.gradients import assert_base_gradients, assert_close, assert_codebook_gradients, model_type
from tl_codebook.attachment import sites
from tl_codebook.convert.layouts import layout_of
from tl_codebook.convert.original_config import PLACES
from tl_codebook.names import codes_hook, hook_name
from tl_codebook.training import CodebookTrainingConfig
from tl_codebook.training.losses import codebook_loss


def ids_by_place(model: Any, cache: Mapping[str, Tensor], layer: int, place: str) -> Tensor:
    """Return the ids [batch pos group slot] of one of the original's codebooks, its groups in the original's order."""
    if place == "qkv" and hook_name(layer, "qkv") in sites(model):
        return grouped(cache[codes_hook(hook_name(layer, "qkv"))])
    parts = [grouped(cache[codes_hook(hook_name(layer, site))]) for site in PLACES[place]]
    if place != "qkv":
        return parts[0]
    if layout_of(model_type(model)).fused == "qkv head d_head":
        return torch.cat(parts, dim=2)
    return rearrange(torch.stack(parts), "qkv b p (head group) s -> b p (head qkv group) s", head=model.cfg.n_heads)


def grouped(ids: Tensor) -> Tensor:
    return ids if ids.ndim == 4 else ids.unsqueeze(2)


def assert_places(model: Any, cache: Mapping[str, Tensor], data: Mapping[str, Tensor], prefix: str, suffix: str, keep: Tensor) -> None:
    """Compare the ids of every codebook that the case has, at the positions of `keep`, and that there are no others."""
    keys = [key.removeprefix(prefix).removesuffix(suffix) for key in data if key.startswith(prefix) and key.endswith(suffix)]
    seen = set()
    for key in keys:
        layer, place, group = read_key(key)
        ids = ids_by_place(model, cache, layer, place)[:, :, group or 0]
        assert ids[keep].tolist() == data[f"{prefix}{key}{suffix}"][keep].tolist(), key
        joint = place == "qkv" and hook_name(layer, "qkv") in sites(model)
        seen |= {hook_name(layer, "qkv")} if joint else {hook_name(layer, site) for site in PLACES[place]}
    assert seen == set(sites(model))


def real_positions(data: Mapping[str, Tensor]) -> Tensor:
    return data.get("attention_mask", torch.ones_like(data["input_ids"])).bool()


def mask_of(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"attention_mask": data["attention_mask"]} if "attention_mask" in data else {}


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def backward(model: Any, data: Mapping[str, Tensor], config: CodebookTrainingConfig, scale: float = 1.0) -> None:
    """Run the original's training step: its reconstruction is not scaled with the loss, and counts padding too."""
    model.zero_grad()
    logits = model(data["input_ids"], **mask_of(data))
    books = [point.codebook for point in sites(model).values() if point.enabled]
    loss = scale * language_model_loss(logits, data.get("labels", data["input_ids"]))
    (loss + codebook_loss(books, config) if books else loss).backward()


def assert_gradients(model: Any, data: Mapping[str, Tensor], prefix: str = "") -> None:
    """Compare the gradients of base and codebooks with ``<prefix>grad/...`` of a case."""
    assert_base_gradients(model, data, f"{prefix}grad/base/")
    places = {read_key(key.split("/")[-2])[:2] for key in data if key.startswith(f"{prefix}grad/cb/")}
    for layer, place in places:
        key = f"{prefix}grad/cb/layer{layer}_{place}"
        if place == "qkv" and hook_name(layer, "qkv") not in sites(model):
            assert_qkv_gradients(model, layer, data, key)
        else:
            name = hook_name(layer, "qkv") if place == "qkv" else hook_name(layer, PLACES[place][0])
            assert_codebook_gradients(sites(model)[name].codebook, data, key)


def assert_qkv_gradients(model: Any, layer: int, data: Mapping[str, Tensor], key: str) -> None:
    books = [sites(model)[hook_name(layer, site)].codebook for site in PLACES["qkv"]]
    groups, heads = books[0].n_groups, model.cfg.n_heads
    for ours, theirs in {"codes": "codebook.weight", "norm_weight": "ln.weight", "norm_bias": "ln.bias"}.items():
        want = torch.stack([data[f"{key}_gcb{group}/{theirs}"] for group in range(3 * groups)])
        if layout_of(model_type(model)).fused == "head qkv d_head":
            want = rearrange(want, "(head qkv group) ... -> (qkv head group) ...", head=heads, qkv=3)
        assert_close(torch.cat([getattr(book, ours).grad for book in books]), want, f"{key} {ours}")
