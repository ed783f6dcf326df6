"""The control of the paper: beside each code of a concept, the best neuron at the same recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from tl_codebook.attachment import sites as codebook_sites
from tl_codebook.errors import ConfigError, DataError, PositionError, ShapeError, check_whole
from tl_codebook.hosts import as_host, evaluating, home_device, resolve_sites
from tl_codebook.names import Address, input_hook
from tl_codebook.store.concepts import At, Query, Searchable, concept_positions
from tl_codebook.store.search import By, CodeHit, search_codes
from tl_codebook.store.text import Vocabulary

__all__ = ["CodeBesideNeuron", "NeuronSource", "compare_with_neurons", "neuron_activations"]

_VALUES_AT_ONCE = 2**24


@dataclass(frozen=True)
class CodeBesideNeuron:
    """A code of a concept, and the neuron that stands best for the concept at (at least) the code's recall."""

    label: str
    precision: float
    """Of the code, 0 to 1."""
    recall: float
    """Of the code, 0 to 1."""
    neuron: str
    """Where it is, and which: ``L3.post[417]``."""
    neuron_precision: float
    """Of the neuron, 0 to 1."""
    neuron_recall: float
    """Of the neuron, 0 to 1, and no less than that of the code."""
    threshold: float
    """The neuron fires at or above it, in the units of its activation."""


class _Part(NamedTuple):
    """Activations of one site at some positions of the store."""

    site: str
    positions: Int64[np.ndarray, " position"]
    values: Float[np.ndarray, "position neuron"]


class NeuronSource:
    """The activations of a model's neurons on the tokens of a store, computed whenever they are read; made by `neuron_activations`."""

    def __init__(self, model: Any, store: Searchable, hooks: Mapping[str, str], batch_size: int) -> None:
        self.model, self.store, self.hooks, self.batch_size = model, store, dict(hooks), batch_size

    def parts(self) -> Iterator[_Part]:
        """Run the model over the store, sequences of one length together so that none is padded, and give what passes."""
        lengths: dict[int, list[int]] = {}
        for index in range(self.store.n_sequences):
            where = self.store.sequence(index)
            lengths.setdefault(where.stop - where.start, []).append(where.start)
        found: dict[str, Tensor] = {}

        def keep(site: str) -> Any:
            def hook(value: Tensor, hook: Any) -> None:
                found[site] = value.detach()

            return hook

        hooks = [(name, keep(site)) for site, name in self.hooks.items()]
        device = home_device(as_host(self.model), "hook_embed")
        for length, starts in lengths.items():
            for first in range(0, len(starts) if length else 0, self.batch_size):
                rows = starts[first : first + self.batch_size]
                tokens = np.stack([self.store.tokens(start, start + length) for start in rows]).astype(np.int64)
                positions = (np.array(rows)[:, None] + np.arange(length)).reshape(-1)
                with evaluating(self.model), torch.no_grad():
                    self.model.run_with_hooks(torch.from_numpy(tokens).to(device), return_type=None, fwd_hooks=hooks)
                for site in self.hooks:
                    yield _Part(site, positions, found[site].flatten(2).flatten(0, 1).float().cpu().numpy())


def neuron_activations(
    model: Any,
    store: Searchable,
    sites: str | Sequence[str] = ("z", "post"),
    *,
    layers: int | Sequence[int] | None = None,
    batch_size: int = 32,
) -> NeuronSource:
    """Name the neurons of a model that `compare_with_neurons` may choose from; the model is run on the store's tokens then.

    Where a codebook is attached, its input is meant: the activations before the codes are chosen.

    Args:
        model: A host: the model that the codes were collected from, or its base.
        store: The tokens.
        sites: Sites or hook names. By default the neurons of attention (before W_O) and of the MLP.
        layers: Of these layers only.
        batch_size: Sequences in one pass, >= 1.

    Raises:
        ConfigError: no sequence in a batch.
        PositionError: a stored sequence that is longer than the model's context.
        UnknownHookError: a site that the model does not have.

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> neuron_activations(model, store, "post").hooks
    {'blocks.0.mlp.hook_post': 'blocks.0.mlp.hook_post', 'blocks.1.mlp.hook_post': 'blocks.1.mlp.hook_post'}
    """
    check_whole("batch_size", batch_size, 1)
    own = codebook_sites(model)
    names = resolve_sites(model, sites if isinstance(sites, str) else list(sites), layers)
    longest = max((store.sequence(i).stop - store.sequence(i).start for i in range(store.n_sequences)), default=0)
    if longest > model.cfg.n_ctx:
        raise PositionError(
            f"the store has sequences of {longest} tokens, but the model takes {model.cfg.n_ctx}. Give the model it was collected from."
        )
    return NeuronSource(model, store, {name: input_hook(name) if name in own else name for name in names}, batch_size)


Activations = NeuronSource | Mapping[str, Any]


def _parts(activations: Activations, n_tokens: int, what: str, progress: bool) -> Iterable[_Part]:
    if isinstance(activations, NeuronSource):
        with tqdm(total=n_tokens * len(activations.hooks), desc=what, unit="value", unit_scale=True, disable=not progress) as bar:
            for found in activations.parts():
                yield found
                bar.update(len(found.positions))
        return
    for site, values in activations.items():
        if values.ndim != 2 or len(values) != n_tokens:
            raise ShapeError(
                f"activations {list(values.shape)} of {site!r} were given, but the store has {n_tokens} positions. Give [token neuron]."
            )
        step = max(1, _VALUES_AT_ONCE // max(1, values.shape[1]))
        for start in range(0, n_tokens, step):
            part = values[start : start + step]
            part = part.detach().float().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
            yield _Part(site, np.arange(start, start + len(part)), part)


def compare_with_neurons(
    store: Searchable,
    query: Query,
    activations: Activations,
    *,
    hits: Sequence[CodeHit] | None = None,
    n: int = 1,
    sites: str | Iterable[str] | None = None,
    by: By = "precision",
    min_recall: float = 0.01,
    at: At = "first",
    group: int | str | None = None,
    shift: int = 0,
    special: bool = False,
    timeout: float = 2.0,
    vocabulary: Vocabulary | None = None,
    progress: bool = True,
) -> list[CodeBesideNeuron]:
    """Return the codes of a concept, each beside the neuron of the greatest precision at (at least) its recall.

    The threshold of a neuron is the highest at which it reaches the recall. Of equal precisions, the neuron of the greater recall, then the
    first. Only high activations count as firing, as in the paper; for low ones as well, give the negated activations too.

    The activations are gone through twice, and those at the positions of the concept are kept in between: positions of the concept times
    neurons, 4 bytes each.

    Args:
        store: A `CodeStore`.
        query: The concept, as for `search_codes`.
        activations: What `neuron_activations` made of a model, or arrays or tensors [token neuron] by name, a row for each position of the
            store.
        hits: The codes, of a search for this query; by default the best `n` are searched for, by precision as in the paper.
        n, sites, by, min_recall: Of that search, as for `search_codes`.
        at, group, shift, special, timeout, vocabulary: As for `search_codes`.
        progress: Show a bar while a model runs, which it does twice over the whole store.

    Raises:
        ConfigError: `hits` of another concept; and as for `search_codes`.
        DataError: activations that are NaN, or none at all; and as for `search_codes`.
        ShapeError: activations of another number of positions; and as for `search_codes`.
        SearchTimeoutError, UnknownHookError, LabelError: as for `search_codes`.

    Source: Tamkin et al. 2023, section 3 (a neuron's threshold is set so that its recall equals that of the code).

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> row = compare_with_neurons(store, r"w4", neuron_activations(model, store))[0]
    >>> row.neuron_recall >= row.recall, row.neuron_precision > 0
    (True, True)
    """
    if not (activations.hooks if isinstance(activations, NeuronSource) else activations):
        raise DataError("no activations were given, so that there is no neuron to choose. Give those of one site or more.")
    positions = concept_positions(store, query, at=at, group=group, shift=shift, timeout=timeout, vocabulary=vocabulary)
    if hits is None:
        mask = np.zeros(store.n_tokens, bool)
        mask[positions] = True
        hits = search_codes(store, mask, sites=sites, by=by, min_recall=min_recall, n=n, special=special)
    counted = np.ones(store.n_tokens, bool)
    counted[np.flatnonzero(store.is_special())] = special
    positions = positions[counted[positions]]
    wrong = [hit for hit in hits if hit.occurrences != len(positions)]
    if wrong:
        raise ConfigError(
            f"{wrong[0].label} was found for a concept that holds at {wrong[0].occurrences} positions, but this one holds at "
            f"{len(positions)}. Give the hits of a search with the same query and options."
        )
    if not hits:
        return []
    # The fewest hits that reach the recall; a code's recall is hits / occurrences, so these are its own.
    needed = np.array([hit.hits for hit in hits])
    holds = np.zeros(store.n_tokens, bool)
    holds[positions] = True
    thresholds, found = _thresholds(_parts(activations, store.n_tokens, "thresholds of neurons", progress), holds, needed)
    fired = _fired(_parts(activations, store.n_tokens, "firings of neurons", progress), counted, thresholds)
    return [_best(hit, index, thresholds, found, fired, len(positions)) for index, hit in enumerate(hits)]


def _thresholds(parts: Iterable[_Part], holds: np.ndarray, needed: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return for each site the threshold [hit neuron] at which a neuron finds as much as the code, and how much that is."""
    own: dict[str, list[np.ndarray]] = {}
    for part in parts:
        if np.isnan(part.values).any():
            raise DataError(f"an activation at {part.site!r} is NaN, which is neither above nor below a threshold. Give numbers.")
        own.setdefault(part.site, []).append(part.values[holds[part.positions]])
    thresholds, found = {}, {}
    for site in list(own):
        values = np.sort(np.concatenate(own.pop(site)), axis=0)
        thresholds[site] = values[len(values) - needed]
        found[site] = np.stack([(values >= at_least).sum(0) for at_least in thresholds[site]])
    return thresholds, found


def _fired(parts: Iterable[_Part], counted: np.ndarray, thresholds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    fired = {site: np.zeros(values.shape, np.int64) for site, values in thresholds.items()}
    for part in parts:
        values = part.values[counted[part.positions]]
        for index, at_least in enumerate(thresholds[part.site]):
            fired[part.site][index] += (values >= at_least).sum(0)
    return fired


def _best(
    hit: CodeHit,
    index: int,
    thresholds: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    fired: Mapping[str, np.ndarray],
    occurrences: int,
) -> CodeBesideNeuron:
    sites = [(site, neuron) for site, values in thresholds.items() for neuron in range(values.shape[1])]
    hits, all_fired, at = (np.concatenate([values[index] for values in kind.values()]) for kind in (found, fired, thresholds))
    precision, recall = hits / all_fired, hits / occurrences
    best = int(np.lexsort((np.arange(len(sites)), -recall, -precision))[0])
    site, neuron = sites[best]
    return CodeBesideNeuron(
        hit.label, hit.precision, hit.recall, f"{_named(site)}[{neuron}]", float(precision[best]), float(recall[best]), float(at[best])
    )


def _named(site: str) -> str:
    return str(Address(None, site)) if site.startswith("blocks.") else site
