"""Run a model as far as its last codebook and read off the ids."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from tl_codebook.errors import ConfigError, HookNeverFiredError, ShapeError
from tl_codebook.hosts import evaluating, home_device, is_bridge, n_layers
from tl_codebook.points import CodebookPoint
from tl_codebook.store.manifest import StoredBook, stored_book

__all__ = ["CodeReader"]

_BLOCK = re.compile(r"blocks\.(\d+)\.")


class CodeReader:
    """Reads the ids of codebooks for sequences of any lengths, and changes nothing of the model.

    Args:
        host: The model.
        points: The codebooks.
        batch_tokens: Most positions of a batch, padding included.
    """

    def __init__(self, host: Any, points: Sequence[CodebookPoint], batch_tokens: int) -> None:
        self.host, self.points, self.batch_tokens = host, list(points), batch_tokens
        self.books = [stored_book(p.site, p.codebook.n_codes, p.codebook.n_groups, p.codebook.k) for p in points]
        self.device = home_device(host, "hook_embed")
        self.vocabulary = int(host.cfg.d_vocab)
        self.causal = getattr(host.cfg, "attention_dir", "causal") == "causal"
        self.options = _options(host, [point.site for point in points])
        self._caught: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note what leaves each ``hook_codes`` inside the ``with`` block; the model is as in evaluation, and counts nothing.

        A hook of PyTorch rather than of TransformerLens: those may edit the ids, for which a snap gives up its fast path.
        """
        counting = [(point.codebook, point.codebook.count_when) for point in self.points]
        handles = [point.hook_codes.register_forward_hook(self._catcher(point.site)) for point in self.points]
        try:
            for book, _ in counting:
                book.count_when = "never"
            with evaluating(self.host), torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for book, when in counting:
                book.count_when = when
            self._caught.clear()

    def _catcher(self, site: str) -> Any:
        def catch(module: Any, inputs: Any, ids: Tensor) -> None:
            self._caught[site] = ids

        return catch

    def read(self, rows: Sequence[Int32[np.ndarray, " _"]]) -> dict[str, np.ndarray]:
        """Return the ids of each codebook, [token, group, k], of sequences one after the other, without their padding.

        Raises:
            HookNeverFiredError: a codebook that the model does not reach.
            ConfigError: the batch does not fit the memory.
        """
        starts = np.cumsum([0, *map(len, rows)])
        out = {book.hook_name: np.empty((starts[-1], book.n_groups, book.k), dtype=book.dtype) for book in self.books}
        for chosen in self._batches([len(row) for row in rows]):
            lengths = [len(rows[i]) for i in chosen]
            tokens = np.zeros((len(chosen), max(lengths)), dtype=np.int64)
            for line, i in zip(tokens, chosen, strict=True):
                line[: len(rows[i])] = rows[i]
            self._run(torch.from_numpy(tokens).to(self.device))
            for book in self.books:
                ids = self._ids_of(book, tokens.shape)
                for line, length, i in zip(ids, lengths, chosen, strict=True):
                    out[book.hook_name][starts[i] : starts[i] + length] = line[:length]
        return out

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Put sequences of similar lengths together, the longest first.

        What follows a position cannot reach it, so padding on the right needs no mask; where it can, only equal lengths go together.
        """
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[batch[0]] if batch else 0
            if batch and ((len(batch) + 1) * longest > self.batch_tokens or (not self.causal and lengths[i] != longest)):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _run(self, tokens: Tensor) -> None:
        self._caught.clear()
        try:
            self.host(tokens, return_type=None, **self.options)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens do not fit the memory of {self.device} ({error}). Give a smaller "
                "batch_size; with resume=True the collection goes on where it was."
            ) from error

    def _ids_of(self, book: StoredBook, shape: tuple[int, ...]) -> np.ndarray:
        ids = self._caught.get(book.hook_name)
        if ids is None:
            raise HookNeverFiredError(f"the codebook at {book.hook_name!r} was not reached. Leave it out of sites=, or detach it.")
        if ids.numel() != shape[0] * shape[1] * book.n_groups * book.k:
            raise ShapeError(
                f"{book.hook_name}.hook_codes: ids of shape {tuple(ids.shape)} came for {shape[0]} x {shape[1]} positions with "
                f"{book.n_groups} x {book.k} slots. Take off the hook that changes their number."
            )
        ids = torch.where(ids < 0, book.n_codes, ids).to(getattr(torch, book.dtype.name))
        return ids.cpu().numpy().reshape(shape[0], shape[1], book.n_groups, book.k)


def _options(host: Any, sites: Sequence[str]) -> dict[str, Any]:
    """Return how to call the model so that it runs no layer above the last of `sites`."""
    found = [_BLOCK.match(site) for site in sites]
    stop = None if None in found else 1 + max(int(match[1]) for match in found if match)
    if is_bridge(host):  # it stops in front of a block, so never behind the last one
        return {} if stop is None or stop >= n_layers(host) else {"stop_at_layer": stop}
    # With padding on the left HookedTransformer would take tokens that happen to be the padding token for padding.
    return {"padding_side": "right"} | ({} if stop is None else {"stop_at_layer": stop})
