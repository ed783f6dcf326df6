"""Texts and their codes, read from a store or from a run of a model, as the views show them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.errors import CheckpointError, ConfigError, DataError, LabelError, PositionError, ShapeError
from tl_codebook.names import Address, Code, as_code, split_hook_name
from tl_codebook.store.concepts import Searchable
from tl_codebook.store.counting import slot_of
from tl_codebook.store.sites import chosen_sites, stored_code
from tl_codebook.store.text import Vocabulary, vocabulary_of
from tl_codebook.views.visible import Piece, pieces_of, shown

__all__ = [
    "Group",
    "Passage",
    "as_codes_given",
    "as_row",
    "books_of",
    "group_of",
    "groups_of",
    "is_store",
    "label_of",
    "model_pieces",
    "read",
    "recording_inputs",
    "words_of",
]

_MOST_TOKENS = 20_000
"""Tokens that one view shows: more make a page that no browser scrolls."""


class Group(NamedTuple):
    """One group of one codebook."""

    hook_name: str
    group: int
    n_groups: int

    def __str__(self) -> str:
        return str(Address(*split_hook_name(self.hook_name), self.group if self.n_groups > 1 else None))

    def code(self, number: int) -> Code:
        """Return one of its codes."""
        return Code(*split_hook_name(self.hook_name), self.group if self.n_groups > 1 else None, number)


@dataclass(frozen=True, eq=False)
class Passage:
    """A text, or a part of one, with the codes at it."""

    where: str
    """What it is, such as ``sequence 3``."""
    first: int
    """Number of the first token in its text."""
    pieces: list[Piece]
    slots: dict[str, Int[np.ndarray, "token group slot"]]
    """The ids by hook name; -1 is no code."""
    inputs: dict[str, Float[Tensor, "token group d_group"]]
    """What the codes were chosen for, by hook name; empty where no model ran."""
    marked: int | None = None
    """The token that the passage is about."""
    sequence: int | None = None
    """Number of the sequence of a store."""

    def rank(self, group: Group, code: int) -> Int[np.ndarray, " token"]:
        """Return the slot that a code has at each token, -1 where it does not fire."""
        return slot_of(self.slots[group.hook_name][:, group.group], code)

    def similarity(self, group: Group, vector: Float[Tensor, " d_group"]) -> Float[np.ndarray, " token"]:
        """Return the cosine of each input and a code, -1 to 1."""
        inputs = self.inputs[group.hook_name][:, group.group].float()
        return torch.nn.functional.cosine_similarity(inputs, vector.detach().cpu().float().unsqueeze(0), dim=-1).double().numpy()

    def said(self, index: int) -> str:
        """Return where a token is, for its tooltip."""
        return f"{self.where}, token {self.first + index}"


def is_store(source: Any) -> bool:
    """Tell a store of codes from a model."""
    return isinstance(source, Searchable)


def books_of(source: Any) -> Mapping[str, Any]:
    """Return the codebooks of a store or a model by hook name, each with `n_codes`, `n_groups` and `k`.

    Raises:
        AttachError: neither a store nor a model.
        ConfigError: a model without codebooks.
    """
    if is_store(source):
        return source.sites
    from tl_codebook.graphs.running import points_of

    return {point.site: point.codebook for point in points_of(source, None)}


def as_codes_given(given: Any) -> list[Code] | None:
    """Return the codes that were given, one or several, as `Code`, label or `CodeHit`; None where a site was given instead.

    Raises:
        LabelError: something else, or an empty list.
    """
    if isinstance(given, str):
        return [as_code(given)] if ":" in given else None
    if isinstance(given, Address):
        return None
    if isinstance(given, Code) or hasattr(given, "code"):
        return [given if isinstance(given, Code) else as_code(given.code)]
    if not isinstance(given, Iterable):
        raise LabelError(f"{given!r} was given for a code or site. Give a label such as 'L3.mlp_out:417', or a site such as 'L3.mlp_out'.")
    many = [as_codes_given(each) for each in given]
    if not many or None in many:
        raise LabelError("a list was given that holds no codes alone. Give codes such as 'L3.mlp_out:417', or one site.")
    return list(dict.fromkeys(code for each in many for code in each or ()))


def group_of(source: Any, code: Code) -> Group:
    """Return the group of a code, refusing codes that there are not.

    Raises:
        UnknownHookError, LabelError, InvalidCodeError: no such codebook, no group where there are several, or no such group or code.
    """
    books = books_of(source)
    code = stored_code(books, code, holder=_holder(source))
    return Group(code.hook_name, code.group or 0, books[code.hook_name].n_groups)


def groups_of(source: Any, site: str | Address) -> list[Group]:
    """Return the groups that a site, an address or a hook name means.

    Raises:
        UnknownHookError: none.
        LabelError: something that is no name.
    """
    books = books_of(source)
    chosen = chosen_sites(books, [site], holder=_holder(source))
    return [Group(name, group, books[name].n_groups) for name, groups in chosen.items() for group in groups]


def _holder(source: Any) -> str:
    return "the store" if is_store(source) else "the model"


_words: weakref.WeakKeyDictionary[Any, tuple[int, Vocabulary]] = weakref.WeakKeyDictionary()


def words_of(source: Any) -> Vocabulary | None:
    """Return the bytes of the tokens of a store or a model, None where nobody knows them."""
    if is_store(source):
        words: Vocabulary | None = source.vocabulary
        return words
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer is None:
        return None
    n_tokens = max(len(tokenizer), int(source.cfg.d_vocab))
    if tokenizer not in _words or _words[tokenizer][0] != n_tokens:
        _words[tokenizer] = (n_tokens, vocabulary_of(tokenizer, n_tokens))
    return _words[tokenizer][1]


def read(source: Any, given: Any, names: Iterable[str], what: str = "text_or_sequence") -> list[Passage]:
    """Return the texts that were given, with the codes of some codebooks: from a store, or by a run of the model.

    Args:
        source: A store or a model.
        given: For a store the number of a sequence, a `Context`, or a list of these; for a model a text or tokens [pos].
        names: Hook names.
        what: What the errors call `given`.

    Raises:
        ConfigError, DataError, PositionError, ShapeError: a text or sequence that cannot be.
    """
    return _of_store(source, given, list(names), what) if is_store(source) else [_of_model(source, given, list(names), what)]


def _checked(n_tokens: int) -> None:
    if n_tokens > _MOST_TOKENS:
        raise DataError(f"{n_tokens} tokens were asked for, and a view shows at most {_MOST_TOKENS}. Give a shorter text, or contexts.")


def _of_store(store: Any, given: Any, names: list[str], what: str) -> list[Passage]:
    found, words = [], words_of(store)
    many = list(given) if isinstance(given, list | tuple) else [given]
    if not many:
        raise DataError(f"{what} is empty. Give the number of a sequence, or contexts.")
    spans = []
    for each in many:
        if hasattr(each, "tokens") and hasattr(each, "start") and hasattr(each, "position"):
            spans.append((each.sequence, int(each.start), int(each.start) + len(each.tokens), each.index))
        elif isinstance(each, int | np.integer) and not isinstance(each, bool):
            if not 0 <= each < store.n_sequences:
                raise PositionError(f"sequence {each} was asked for, but the store has {store.n_sequences}: 0 to {store.n_sequences - 1}.")
            whole = store.sequence(int(each))
            spans.append((int(each), whole.start, whole.stop, None))
        else:
            raise ConfigError(
                f"{what} is {shown(repr(each))[:80]}, but a store was given, whose texts are its own. Give the number of a sequence or a "
                "Context; for a text of your own, give the model."
            )
    _checked(sum(stop - start for _, start, stop, _ in spans))
    special = store.is_special()
    for sequence, start, stop, marked in spans:
        pieces = pieces_of(store.tokens(start, stop), words, special[start:stop])
        slots = {}
        for name in names:
            ids = np.asarray(store.ids(name)[start:stop]).astype(np.int64)
            n_codes = store.sites[name].n_codes
            if (ids > n_codes).any():
                raise CheckpointError(f"the store holds code {int(ids.max())} of {n_codes} at {name}: it is damaged. Collect it again.")
            slots[name] = np.where(ids == n_codes, -1, ids)
        first = start - store.sequence(int(sequence)).start
        found.append(Passage(f"sequence {sequence}", first, pieces, slots, {}, marked, int(sequence)))
    return found


def as_row(model: Any, given: Any, what: str) -> Int[Tensor, "1 pos"]:
    """Return one row of tokens from a text or from tokens [pos].

    Raises:
        ConfigError, DataError, ShapeError: no text, several, or one that the model cannot take.
    """
    from tl_codebook.graphs.running import as_rows

    if isinstance(given, int | np.integer | bool):
        raise ConfigError(f"{what} is {given}, but a model was given, which has no sequences. Give a text or tokens, or a store.")
    for text in [given] if isinstance(given, str) else []:
        if not text:
            raise DataError(f"{what} is empty. Give a text with a token or more.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{what} has half of a surrogate pair at character {error.start}, which is no text. Leave it out.") from None
    if not isinstance(given, str | Tensor) and not (isinstance(given, list | tuple) and given and isinstance(given[0], str)):
        try:
            array = np.asarray(given)
            given = torch.as_tensor(array.astype(np.int64) if array.dtype.kind in "iu" else array)
        except (TypeError, ValueError):
            raise ShapeError(f"{what} is a {type(given).__name__}. Give a text, or token ids [pos].") from None
    if isinstance(given, Tensor) and given.ndim == 1:
        given = given.unsqueeze(0)
    rows = as_rows(model, given, what)
    if len(rows) != 1:
        raise ShapeError(f"{what} has {len(rows)} rows, and a view shows one text. Give one of them.")
    _checked(rows.shape[1])
    return rows


def model_pieces(model: Any, row: Int[Tensor, "1 pos"]) -> list[Piece]:
    """Return what is shown of the tokens of a row."""
    special = set(getattr(getattr(model, "tokenizer", None), "all_special_ids", ()))
    tokens = row[0].numpy()
    return pieces_of(tokens, words_of(model), [token in special for token in tokens.tolist()])


def _of_model(model: Any, given: Any, names: list[str], what: str) -> Passage:
    from tl_codebook.steering import run_rows

    row = as_row(model, given, what)
    hooks, slots, inputs = recording_inputs(model, names, row.shape[1])
    run_rows(model, row, hooks)
    return Passage("text", 0, model_pieces(model, row), slots, inputs)


def recording_inputs(model: Any, names: Iterable[str], n_pos: int) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Return hooks that note ids and inputs of codebooks over one row, and where they note them."""
    from tl_codebook.attachment import match_sites
    from tl_codebook.names import codes_hook, input_hook

    slots: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    hooks: list[Any] = []
    for point in match_sites(model, list(names)):
        book, name = point.codebook, point.site

        def note_ids(ids: Tensor, hook: Any, name: str = name, book: Any = book) -> None:
            slots[name] = ids.detach().cpu().reshape(n_pos, book.n_groups, -1).clamp(min=-1).numpy()

        def note_inputs(x: Tensor, hook: Any, name: str = name, book: Any = book) -> None:
            inputs[name] = book.normalise(x.detach().reshape(n_pos, book.n_groups, book.d_group)).cpu()

        hooks += [(input_hook(name), note_inputs), (codes_hook(name), note_ids)]
    return hooks, slots, inputs


def label_of(labels: Any, code: Code) -> str:
    """Return what somebody calls a code, one visible line, empty where nobody does.

    Args:
        labels: None, or a mapping from labels such as ``L3.mlp_out:417`` to texts, or to objects with a ``text``.
        code: The code.

    Raises:
        ConfigError: labels that are no mapping.
    """
    if labels is None:
        return ""
    get = getattr(labels, "get", None)
    if get is None:
        raise ConfigError(f"labels is a {type(labels).__name__}. Give a mapping from labels of codes to texts, such as a dict.")
    found = get(str(code))
    found = get(code) if found is None else found
    return "" if found is None else shown(getattr(found, "text", found))
