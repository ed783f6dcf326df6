"""Which codebooks, groups and codes are meant where somebody names them: of a store, or of whatever else has codebooks by hook name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tl_codebook.errors import ConfigError, InvalidCodeError, LabelError, UnknownHookError, nearest
from tl_codebook.names import SITES, Address, Code, as_address, split_hook_name

__all__ = ["Wanted", "chosen_sites", "label_of_site", "stored_code"]

Wanted = str | Address | Iterable[str | Address]
"""Sites (``z``), addresses (``L3.mlp_out``, ``L5.z.2``) or hook names: one, or several."""


def label_of_site(hook_name: str) -> str:
    """Return the address of a hook point: ``L3.mlp_out``, or its hook name where it is no site of the table.

    >>> label_of_site("blocks.3.hook_mlp_out")
    'L3.mlp_out'
    """
    return str(Address(None, hook_name))


def chosen_sites(books: Mapping[str, Any], wanted: Wanted | None = None, *, holder: str = "the store") -> dict[str, list[int]]:
    """Return the hook names that sites, addresses or hook names mean, in the order in which they were named, each with its groups.

    An address with a group (``L5.z.2``) means that group alone. What is named twice is there once.

    Args:
        books: Codebooks by hook name, each with `n_groups`: `CodeStore.sites`.
        wanted: Which; None for all.
        holder: Whose they are, for errors.

    Returns:
        Hook name -> groups, ascending.

    Raises:
        UnknownHookError: a site, or a group of one, that is not there.
        ConfigError: nothing was asked for.
        LabelError: something that is no name.

    >>> from tl_codebook.store.manifest import stored_book
    >>> sizes = {"blocks.0.attn.hook_z": 4, "blocks.0.hook_mlp_out": 1, "blocks.1.attn.hook_z": 4}
    >>> books = {name: stored_book(name, n_codes=16, n_groups=n_groups, k=2) for name, n_groups in sizes.items()}
    >>> chosen_sites(books, ["L1.z.2", "L1.z.0", "mlp_out"])
    {'blocks.1.attn.hook_z': [0, 2], 'blocks.0.hook_mlp_out': [0]}
    """
    if wanted is None:
        return {name: list(range(book.n_groups)) for name, book in books.items()}
    chosen: dict[str, set[int]] = {}
    for asked in [wanted] if isinstance(wanted, str | Address) else wanted:
        found, group = _meant(books, asked)
        n_groups = books[found[0]].n_groups if found else 0
        if not found or (group is not None and group >= n_groups):
            raise _unknown(books, asked, holder, f"{label_of_site(found[0])} has {n_groups} {_groups(n_groups)}" if found else "")
        for name in found:
            chosen.setdefault(name, set()).update(range(books[name].n_groups) if group is None else [group])
    if not chosen:
        raise ConfigError("an empty list of sites was given, so that there is no code to look at. Give sites, or None for all.")
    return {name: sorted(groups) for name, groups in chosen.items()}


def _meant(books: Mapping[str, Any], asked: str | Address) -> tuple[list[str], int | None]:
    """Return the hook names that one name means, and its group, None where it names none."""
    if isinstance(asked, str) and asked in SITES:
        return [name for name in books if split_hook_name(name)[1] == asked], None
    if isinstance(asked, str) and asked in books:
        return [asked], None
    try:
        address = as_address(asked)
    except LabelError:
        if not isinstance(asked, str):
            raise
        return [], None
    return [name for name in books if name == address.hook_name], address.group


def _groups(n_groups: int) -> str:
    return "group, 0" if n_groups == 1 else f"groups, 0 to {n_groups - 1}"


def _unknown(books: Mapping[str, Any], asked: object, holder: str, reason: str = "") -> UnknownHookError:
    labels = list(map(label_of_site, books))
    advice = nearest(str(asked)[:200], dict.fromkeys([*labels, *books]))
    return UnknownHookError(f"{holder} has no codes of {str(asked)[:80]!r}. {advice}{reason or 'It has codes of: ' + ', '.join(labels)}.")


def stored_code(books: Mapping[str, Any], code: Code, *, holder: str = "the store") -> Code:
    """Return a code as labels write it (without a group where its codebook has one), refusing codes that there are not.

    Args:
        books: Codebooks by hook name, each with `n_groups` and `n_codes`.
        code: The code.
        holder: Whose they are, for errors.

    Raises:
        UnknownHookError: no codes of its site are there.
        LabelError: it names no group, and there are several.
        InvalidCodeError: there is no such group or code.

    >>> from tl_codebook.store.manifest import stored_book
    >>> str(stored_code({"blocks.3.hook_mlp_out": stored_book("blocks.3.hook_mlp_out", 16, 1, 2)}, Code(3, "mlp_out", 0, 7)))
    'L3.mlp_out:7'
    """
    if code.hook_name not in books:
        raise _unknown(books, code.address, holder)
    book, label = books[code.hook_name], label_of_site(code.hook_name)
    if code.group is None and book.n_groups > 1:
        raise LabelError(f"{code} names no group, and {label} has {book.n_groups}. Write {label}.0:{code.code}, or another group.")
    if (code.group or 0) >= book.n_groups or code.code >= book.n_codes:
        raise InvalidCodeError(
            f"{code} was asked for, but {label} has {book.n_groups} {'group' if book.n_groups == 1 else 'groups'} of {book.n_codes} codes. "
            f"Groups go from 0 to {book.n_groups - 1}, codes from 0 to {book.n_codes - 1}."
        )
    return code if book.n_groups > 1 else Code(code.layer, code.site, None, code.code)
