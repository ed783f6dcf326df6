"""The one place that formats and parses names: sites, hook names, code labels.

A *site* is a kind of activation, by TransformerLens' short names (`SITES`). A *hook name* is the HookedTransformer spelling of one
hook point (``blocks.3.hook_mlp_out``), the same on every host. A *label* names one code: ``L5.z.2:88`` (layer 5, site z, group 2,
code 88), ``L3.mlp_out:417`` where a codebook has one group. Without the code it is an *address*: ``L5.z.2``, ``L3.mlp_out``.
A codebook at a hook point outside the site table is named by its hook name: ``blocks.0.mlp.hook_pre:7``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tl_codebook.errors import InvalidCodeError, LabelError, nearest

__all__ = [
    "CODES",
    "HEAD_SITES",
    "INPUT",
    "MADE_OF",
    "SITES",
    "Address",
    "Code",
    "CodeLike",
    "as_address",
    "as_code",
    "as_codes",
    "codes_hook",
    "hook_name",
    "input_hook",
    "split_hook_name",
]

SITES: dict[str, str] = {
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "post": "mlp.hook_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "resid_delta": "hook_resid_delta",
    "qkv": "attn.hook_qkv",
}
"""Site -> what follows ``blocks.<layer>.`` in the hook name. `resid_delta` is what a block adds to the residual stream, `qkv` is q, k and v
as one vector [head, (q k v), d_head]; TransformerLens has no hook points for them, `attach` makes them."""

MADE_OF: dict[str, tuple[str, ...]] = {
    "resid_delta": ("hook_resid_pre", "hook_resid_post"),
    "qkv": ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
}
"""Site that `attach` makes a hook point for -> the hook points that serve it, in the order in which they fire."""

HEAD_SITES = ("z", "q", "k", "v")
"""The sites that have one activation per attention head (per key-value head at k and v)."""

CODES, INPUT = "hook_codes", "hook_x"
"""The hook points under a site: the ids, and what goes into the codebook."""

_SITE_OF = {tail: site for site, tail in SITES.items()}
_BLOCK = re.compile(r"blocks\.(\d{1,18})\.([A-Za-z_][\w.]*)", re.ASCII)
_ADDRESS = re.compile(r"(?:L(?P<layer>\d{1,18})\.)?(?P<site>[A-Za-z_]\w*(?:\.(?:\d+\.)?[A-Za-z_]\w*)*)(?:\.(?P<group>\d{1,18}))?", re.ASCII)


def hook_name(layer: int | None, site: str) -> str:
    """Return the hook name of a site.

    >>> hook_name(3, "mlp_out")
    'blocks.3.hook_mlp_out'
    """
    if layer is None:
        return site
    if site not in SITES:
        raise LabelError(f"no site {site!r}. {nearest(site, SITES)}Sites: {' '.join(SITES)}.")
    return f"blocks.{layer}.{SITES[site]}"


def split_hook_name(name: str) -> tuple[int | None, str]:
    """Return layer and site of a hook name; ``(None, name)`` for a hook point outside the site table.

    >>> split_hook_name("blocks.5.attn.hook_z")
    (5, 'z')
    """
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _SITE_OF:
        return int(match[1]), _SITE_OF[match[2]]
    return None, name


class CodesHookName(str):
    """A hook name made by this package; a Bridge that ignores unknown names in silence is made to raise on one of these."""

    __slots__ = ()


def codes_hook(name: str) -> str:
    """Return the name of the hook point that carries the ids of the codebook at `name`."""
    return CodesHookName(f"{name}.{CODES}")


def input_hook(name: str) -> str:
    """Return the name of the hook point that carries what goes into the codebook at `name`."""
    return CodesHookName(f"{name}.{INPUT}")


def _whole(value: Any, what: str) -> int:
    """Accept ints and integer tensors or numpy integers; refuse bools, floats, strings and negatives."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    error = InvalidCodeError if what == "code" else LabelError
    if isinstance(value, bool) or "bool" in kind:
        raise error(f"{what} {value!r} is a bool. Give a whole number >= 0.")
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{what} {value!r} is a {type(value).__name__}. Give a whole number >= 0.") from None
    if number < 0:
        raise error(f"{what} {number} is negative, and negative ids do not count from the end. Give a whole number >= 0.")
    return number


@dataclass(frozen=True)
class Address:
    """Where a codebook, or one group of it, sits.

    >>> Address.parse("L5.z.2")
    Address(layer=5, site='z', group=2)
    >>> Address.parse("L3.mlp_out").hook_name
    'blocks.3.hook_mlp_out'
    """

    layer: int | None
    site: str
    group: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            raise LabelError(f"site {self.site!r} is a {type(self.site).__name__}. Give one of {' '.join(SITES)}, or a hook name.")
        if self.layer is None:
            layer, site = split_hook_name(self.site)
            object.__setattr__(self, "layer", layer)
            object.__setattr__(self, "site", site)
        else:
            object.__setattr__(self, "layer", _whole(self.layer, "layer"))
        if self.group is not None:
            object.__setattr__(self, "group", _whole(self.group, "group"))
        if self.layer is None:
            if "hook_" not in self.site or not _ADDRESS.fullmatch(self.site) or self.site.endswith((f".{CODES}", f".{INPUT}")):
                raise LabelError(
                    f"{self.site!r} is neither a site with a layer nor a hook name. "
                    "Write 'L3.mlp_out', 'L5.z.2' or 'blocks.0.mlp.hook_pre'."
                )
        else:
            hook_name(self.layer, self.site)  # the site must exist

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``L5.z.2``, ``L3.mlp_out`` or a hook name."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise LabelError(
                f"cannot read {text!r} as an address. Write 'L<layer>.<site>' or 'L<layer>.<site>.<group>', such as 'L3.mlp_out' "
                "or 'L5.z.2'."
            )
        layer = None if match["layer"] is None else int(match["layer"])
        return cls(layer, match["site"], None if match["group"] is None else int(match["group"]))

    @property
    def hook_name(self) -> str:
        """Return the hook name of the site."""
        return hook_name(self.layer, self.site)

    def __str__(self) -> str:
        head = self.site if self.layer is None else f"L{self.layer}.{self.site}"
        return head if self.group is None else f"{head}.{self.group}"


@dataclass(frozen=True)
class Code:
    """One code of one codebook.

    `group` is None where the codebook has one group.

    >>> Code.parse("L5.z.2:88")
    Code(layer=5, site='z', group=2, code=88)
    >>> str(Code(3, "mlp_out", None, 417))
    'L3.mlp_out:417'
    """

    layer: int | None
    site: str
    group: int | None
    code: int

    def __post_init__(self) -> None:
        place = Address(self.layer, self.site, self.group)
        for field in ("layer", "site", "group"):
            object.__setattr__(self, field, getattr(place, field))
        object.__setattr__(self, "code", _whole(self.code, "code"))

    @classmethod
    def parse(cls, label: str) -> Code:
        """Read a label such as ``L5.z.2:88``."""
        place, colon, number = label.rpartition(":")
        if not colon or not number.isascii() or not number.isdigit() or len(number) > 18:
            raise LabelError(f"cannot read {label!r} as a code. Write '<address>:<code>', such as 'L3.mlp_out:417' or 'L5.z.2:88'.")
        address = Address.parse(place)
        return cls(address.layer, address.site, address.group, int(number))

    @property
    def address(self) -> Address:
        """Return where the code sits."""
        return Address(self.layer, self.site, self.group)

    @property
    def hook_name(self) -> str:
        """Return the hook name of the site."""
        return hook_name(self.layer, self.site)

    def __str__(self) -> str:
        return f"{self.address}:{self.code}"

    def _order(self) -> tuple[Any, ...]:
        rank = list(SITES).index(self.site) if self.site in SITES else len(SITES)
        return (
            -1 if self.layer is None else self.layer,
            rank,
            self.site,
            -1 if self.group is None else self.group,
            self.code,
        )

    def __lt__(self, other: Any) -> bool:
        if not isinstance(other, Code):
            return NotImplemented
        return self._order() < other._order()


@runtime_checkable
class AboutCode(Protocol):
    """A row about one code, such as a hit of a search: it stands for the code."""

    @property
    def code(self) -> Any:
        """Return the code."""


CodeLike = Code | str | AboutCode
"""A code, its label, or a row about it."""


def as_address(
    address: Address | Code | str | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
    group: int | None = None,
    head: int | None = None,
) -> Address:
    """Return an `Address` from any of the ways in which one is written: an object, a text, or its parts."""
    if group is not None and head is not None and group != head:
        raise LabelError(f"group={group} and head={head} were both given and differ. head= is another word for group=; give one.")
    group = head if group is None else group
    if address is None:
        if site is None:
            raise LabelError("no address was given. Give 'L5.z.2' or layer=5, site='z', group=2.")
        return Address(layer, site, group)
    if not (layer is None and site is None and group is None):
        raise LabelError(f"{address!r} was given together with layer=, site=, group= or head=. Give one or the other.")
    if isinstance(address, Address):
        return address
    if isinstance(address, Code):
        return address.address
    if not isinstance(address, str):
        raise LabelError(f"cannot read {address!r} as an address. Give 'L5.z.2' or layer=5, site='z', group=2.")
    return Address.parse(address)


def as_code(code: Any = None, **parts: Any) -> Code:
    """Return a `Code` from a `Code`, a label, a row about one, or ``layer= site= group= code=`` (``head=`` is ``group=``)."""
    given = any(value is not None for value in parts.values())
    if isinstance(getattr(code, "code", None), Code):
        code = code.code
    if isinstance(code, Code) and not given:
        return code
    if isinstance(code, Code) or (isinstance(code, str) and ":" in code):
        if given:
            raise LabelError(f"the code {str(code)!r} was given together with layer=, site=, group= or head=. Give one or the other.")
        return Code.parse(str(code))
    if isinstance(code, str | Code):
        raise LabelError(f"cannot read {code!r} as a code. Write '<address>:<code>', such as 'L3.mlp_out:417' or 'L5.z.2:88'.")
    if parts.get("site") is None:
        raise LabelError(
            f"code {code!r} was given without its place. Give a label such as 'L3.mlp_out:417', or layer=, site= and code= (and "
            "group= where there are several)."
        )
    place = as_address(**{key: parts.get(key) for key in ("layer", "site", "group", "head")})
    return Code(place.layer, place.site, place.group, _whole(code, "code"))


def as_codes(codes: Any, **parts: Any) -> tuple[Code, ...]:
    """Return the codes of one call, all of one place, without repetition."""
    many: Sequence[Any] | Iterable[Any]
    if isinstance(codes, str | Code):
        many = [codes]
    elif (hasattr(codes, "tolist") and getattr(codes, "ndim", 0) > 0) or (isinstance(codes, Iterable) and not hasattr(codes, "dtype")):
        many = list(codes)
    else:
        many = [codes]
    result = tuple(as_code(code, **parts) for code in many)
    if not result:
        raise InvalidCodeError("no code was given. Give one code or several, such as 'L3.mlp_out:417'.")
    places = {str(code.address): None for code in result}
    if len(places) > 1:
        raise LabelError(f"one hook acts at one place, but these codes sit at {', '.join(places)}. Make one hook for each.")
    repeated = sorted({code.code for code in result if [c.code for c in result].count(code.code) > 1})
    if repeated:
        raise InvalidCodeError(f"code {repeated[0]} was given more than once at {result[0].address}. Give each code once.")
    return result
