"""Run rows of tokens a batch at a time, each row under its own edits of codes, and keep the ids that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook.attachment import match_sites, sites
from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.names import Address, codes_hook
from tl_codebook.points import CodebookPoint
from tl_codebook.steering import run_rows
from tl_codebook.store.counting import firing_counts, nearest_in_use

__all__ = ["as_rows", "codes_of", "count_ids", "equally_frequent", "frequencies", "points_of", "recording", "same_slots"]

Hook = tuple[str, Callable[..., Any]]
Ids = dict[str, Tensor]
"""Ids [row pos group slot] by hook name, on the CPU."""


def as_rows(model: Any, given: Any, what: str) -> Int[Tensor, "row pos"]:
    """Return tokens [row pos] on the CPU from tokens, a text or several texts of one length in tokens; nothing is padded.

    Raises:
        ConfigError: a text for a model without a tokenizer.
        ShapeError: no tokens [row pos], or texts of several lengths.
        DataError: no token, or tokens that are not in the vocabulary or too many for the context.
    """
    if isinstance(given, str) or (isinstance(given, list | tuple) and given and all(isinstance(text, str) for text in given)):
        if getattr(model, "tokenizer", None) is None:
            raise ConfigError(f"{what} is text, but the model has no tokenizer. Give tokens [row pos].")
        each = [model.to_tokens(text) for text in ([given] if isinstance(given, str) else given)]
        lengths = sorted({row.shape[1] for row in each})
        if len(lengths) > 1:
            raise ShapeError(
                f"{what} has texts of {' and '.join(map(str, lengths))} tokens. Give texts of one length, or tokens [row pos]."
            )
        given = torch.cat(each)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.ndim != 2:
        kind = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ShapeError(f"{what} is {kind}. Give token ids [row pos], or text.")
    vocabulary, context = int(model.cfg.d_vocab), int(model.cfg.n_ctx)
    if not given.numel():
        raise DataError(f"{what} is {list(given.shape)}, which has no token. Give one row or more.")
    if int(given.min()) < 0 or int(given.max()) >= vocabulary:
        raise DataError(
            f"{what} has token ids from {int(given.min())} to {int(given.max())}, but the model's vocabulary is 0 to {vocabulary - 1}. Use "
            "its own tokenizer."
        )
    if given.shape[1] > context:
        raise DataError(f"{what} has {given.shape[1]} positions, but the model takes {context}. Give shorter rows.")
    return given.detach().cpu().long()


def points_of(model: Any, names: str | Iterable[str] | None) -> list[CodebookPoint]:
    """Return the codebooks meant, in the order of the layers.

    Raises:
        ConfigError: the model has none, none was asked for, or a group of one was.
        UnknownHookError: a name at which no codebook sits.
    """
    if not sites(model):
        raise ConfigError("the model has no codebooks. Call attach first, or load a model that was saved with them.")
    names = names if names is None or isinstance(names, str) else list(names)
    for name in [names] if isinstance(names, str) else names or []:
        if name.startswith("L") and Address.parse(name).group is not None:
            raise ConfigError(
                f"{name!r} was asked for, which is one group, but sites= means whole codebooks. Give {name.rpartition('.')[0]!r}, with "
                "by='group' to have each group on its own."
            )
    chosen = {point.site for point in match_sites(model, names)}
    if not chosen:
        raise ConfigError("sites is empty. Give hook names, addresses ('L3.mlp_out') or sites ('z'), or leave it out for all codebooks.")
    return [point for name, point in sites(model).items() if name in chosen]


def recording(points: Sequence[CodebookPoint]) -> tuple[list[Hook], Ids]:
    """Return hooks that note the ids of codebooks as other hooks, if they come before, have left them; and where they note them."""
    found: Ids = {}

    def note(point: CodebookPoint) -> Callable[..., None]:
        def hook(ids: Tensor, hook: Any) -> None:
            found[point.site] = (ids.unsqueeze(2) if point.codebook.n_groups == 1 else ids).detach().cpu()

        return hook

    return [(codes_hook(point.site), note(point)) for point in points], found


def codes_of(model: Any, tokens: Int[Tensor, "row pos"], points: Sequence[CodebookPoint], batch_size: int) -> tuple[list[Tensor], Ids]:
    """Run all rows, and return the logits of each batch and the ids of the codebooks."""
    logits: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {point.site: [] for point in points}
    for rows in tokens.split(batch_size):
        hooks, found = recording(points)
        logits.append(run_rows(model, rows, hooks))
        for name, ids in found.items():
            kept[name].append(ids)
    return logits, {name: torch.cat(same_slots(parts, points[i])) for i, (name, parts) in enumerate(kept.items())}


def same_slots(parts: Sequence[Int[Tensor, "..."]], point: CodebookPoint) -> list[Int[Tensor, "..."]]:
    """Give ids of different runs the same number of slots, by slots that change nothing; a user's own hooks may add some."""
    widest = max(ids.shape[-1] for ids in parts)
    nothing = -2 if point.codebook.config.reduce == "mean" else -1
    return [torch.nn.functional.pad(ids, (0, widest - ids.shape[-1]), value=nothing) for ids in parts]


def equally_frequent(counts: Int[Tensor, " code"], code: int, generator: torch.Generator, n: int = 10) -> Int[Tensor, " other"]:
    """Return the `n` other codes whose counts are the nearest to that of a code (fewer where there are no more), equals in random order."""
    shuffled = torch.randperm(len(counts), generator=generator).numpy()
    return torch.from_numpy(nearest_in_use(counts.numpy(), code, shuffled, n))


def count_ids(ids: Int[Tensor, "row pos group slot"], n_codes: int) -> Int[Tensor, "group code"]:
    """Return at how many positions each code is; a code in two slots of one position counts once."""
    return torch.from_numpy(firing_counts(torch.where(ids < 0, n_codes, ids).flatten(0, 1).numpy(), n_codes))


def frequencies(source: Any, points: Sequence[CodebookPoint], ids: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return counts [group code] by hook name: of a store, if there is one, else of the ids that were seen."""
    result = {}
    for point in points:
        shape = (point.codebook.n_groups, point.codebook.n_codes)
        if source is None:
            counts = torch.stack([count_ids(each[point.site], shape[1]) for each in ids]).sum(0)
        elif point.site not in source.sites:
            raise DataError(
                f"the store has no codes of {point.site!r}, whose frequencies are needed for a control. Leave it out of sites=."
            )
        else:
            counts = torch.as_tensor(source.counts(point.site)).long()
        if counts.shape != shape:
            raise DataError(
                f"the store counts {list(counts.shape)} at {point.site!r}, where the model has {list(shape)} codes. Collect anew."
            )
        result[point.site] = counts
    return result
