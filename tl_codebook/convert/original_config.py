"""The configuration of a codebook-features 0.1.2 checkpoint, read the way the original reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tl_codebook.errors import ConfigError

__all__ = ["PLACES", "OriginalConfig"]

PLACES: dict[str, tuple[str, ...]] = {
    "attn_preproj": ("z",),
    "attn": ("attn_out",),
    "mlp": ("mlp_out",),
    "mlp_mid": ("post",),
    "transformer_block": ("resid_post",),
    "qkv": ("q", "k", "v"),
    "attn_plus_mlp": ("resid_delta",),
}
"""Where the original puts a codebook (`codebook_at`) -> our sites."""

_TYPES = ("vanilla", "group")
_METRICS = ("euclidean", "inner_product")
_LOSSES = ("base", "aeloss", "fullaeloss", "vqvae")


def _per_place(name: str, value: Any, n_places: int, kind: type) -> tuple[Any, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value] * n_places
    if len(values) != n_places:
        raise ConfigError(f"{name} has {len(values)} values for {n_places} places in codebook_at. Give one value, or one for each place.")
    for item in values:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise ConfigError(f"{name} holds {item!r}. It needs a {kind.__name__}, or one for each place.")
    return tuple(values)


@dataclass(frozen=True)
class OriginalConfig:
    """What ``config.json`` of a codebook-features checkpoint says, one value per place.

    Raises:
        ConfigError: for what the original refuses too, and for types that cannot be meant.

    Source: codebook-features 0.1.2, ``CodebookModelConfig``.

    >>> OriginalConfig.from_dict({"codebook_at": ["attn", "mlp"], "k_codebook": 5}).k_codebook
    (5, 5)
    """

    codebook_at: tuple[str, ...] = ("mlp",)
    codebook_type: tuple[str, ...] = ("vanilla",)
    num_codes: tuple[int, ...] = (100,)
    num_codebooks: tuple[int, ...] = (1,)
    """Groups of each place; -1 is one per attention head."""
    k_codebook: tuple[int, ...] = (1,)
    layers_to_snap: tuple[int, ...] | str = ()
    """Layers, negative ones from the end, or ``all``."""
    similarity_metric: str = "inner_product"
    loss: str = "aeloss"
    codebook_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Among others ``replace_after_steps``: steps after which a dead code is replaced, 0 never."""
    kmeans_init: bool = False
    kmeans_init_examples: int = 1000
    kmeans_kwargs: Mapping[str, Any] | None = None
    kmeans_path: str | None = None

    def __post_init__(self) -> None:
        for kind in self.codebook_type:
            if kind not in _TYPES:
                raise ConfigError(f"codebook_type={kind!r} is not known. The original has {' and '.join(_TYPES)}.")
        for kind, number in zip(self.codebook_type, self.num_codebooks, strict=True):
            if kind == "vanilla" and number != 1:
                raise ConfigError(f"num_codebooks={number} was given for a vanilla codebook, which is one. Use codebook_type='group'.")
            if number < 1 and number != -1:
                raise ConfigError(f"num_codebooks={number} was given. Give a number >= 1, or -1 for one per attention head.")
        for name in ("num_codes", "k_codebook"):
            for number in getattr(self, name):
                if number < 1:
                    raise ConfigError(f"{name}={number} was given. Give a number >= 1.")
        if self.loss.split("-")[0] not in _LOSSES:
            raise ConfigError(f"loss={self.loss!r} is not known. The original has {', '.join(_LOSSES)}.")
        if self.similarity_metric not in _METRICS:
            raise ConfigError(f"similarity_metric={self.similarity_metric!r} is not known. The original has {' and '.join(_METRICS)}.")
        if self.codebook_kwargs.get("soft_snap") or not self.codebook_kwargs.get("snap", True):
            raise ConfigError(
                f"codebook_kwargs={dict(self.codebook_kwargs)!r} asks for codebooks that do not snap (soft_snap, or snap=False), which the "
                "original never finished. Take the entry out of codebook_kwargs."
            )

    @property
    def replace_codes(self) -> bool:
        """Whether the original replaced dead codes while training."""
        return bool(self.codebook_kwargs.get("replace_after_steps", 0) > 0)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> OriginalConfig:
        """Read the original's fields out of a configuration; those of Hugging Face beside them are left alone."""
        own = {f.name for f in fields(cls)}
        values = {name: value for name, value in given.items() if name in own}
        at = values.get("codebook_at", "mlp")
        places = [at] if isinstance(at, str) else at
        if not isinstance(places, Sequence) or not places or not all(isinstance(place, str) for place in places):
            raise ConfigError(f"codebook_at={at!r} names no place. The original has {', '.join(PLACES)}.")
        values["codebook_at"] = tuple(places)
        for name, kind in (("codebook_type", str), ("num_codes", int), ("num_codebooks", int), ("k_codebook", int)):
            default = getattr(cls, name)[0]
            values[name] = _per_place(name, values.get(name, default), len(places), kind)
        layers = values.get("layers_to_snap", ())
        if layers != "all":
            if (
                isinstance(layers, str)
                or not isinstance(layers, Sequence)
                or any(isinstance(i, bool) or not isinstance(i, int) for i in layers)
            ):
                raise ConfigError(f"layers_to_snap={layers!r} names no layers. Give a list of numbers, or 'all'.")
            values["layers_to_snap"] = tuple(layers)
        if values.get("codebook_kwargs") is None:
            values["codebook_kwargs"] = {}
        steps = values["codebook_kwargs"].get("replace_after_steps", 0) if isinstance(values["codebook_kwargs"], Mapping) else 0
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise ConfigError(f"codebook_kwargs has replace_after_steps={steps!r}. It needs a whole number; 0 replaces nothing.")
        kinds = {"codebook_kwargs": Mapping, "loss": str, "similarity_metric": str, "kmeans_init": bool, "kmeans_init_examples": int}
        for name, expected in kinds.items():
            if name in values and not isinstance(values[name], expected):
                raise ConfigError(f"{name}={values[name]!r} is a {type(values[name]).__name__}. It needs a {expected.__name__}.")
        return cls(**values)

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers that have codebooks in a model of `n_layers`, in order."""
        if isinstance(self.layers_to_snap, str):
            return tuple(range(n_layers))
        for layer in self.layers_to_snap:
            if not -n_layers <= layer < n_layers:
                raise ConfigError(
                    f"layers_to_snap names layer {layer}, the base model has {n_layers} layers. Give the base it was trained on."
                )
        return tuple(sorted({layer % n_layers for layer in self.layers_to_snap}))

    def groups(self, n_heads: int) -> tuple[int, ...]:
        """Return the number of groups of each place in a model of `n_heads` attention heads."""
        return tuple(n_heads if number == -1 else number for number in self.num_codebooks)
