"""Components of CircuitsVis in a page that needs no network and runs no script of a token.

The JavaScript is read from the installed package, once a page, and allowed by its hash. What CircuitsVis itself would write as HTML is
never used: it loads a script from a server, asks the network whether there is one, and lets a token run scripts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tl_codebook.errors import ConfigError
from tl_codebook.views.visible import Piece, escape, shown

__all__ = ["NO_SCRIPT_POLICY", "Component", "bundle", "embedded", "inert", "policy", "script_json"]

_KNOWN = ("AttentionHeads", "AttentionPatterns", "ColoredTokens", "ColoredTokensMulti", "TextNeuronActivations")
_JOINER = "\u2060"
NO_SCRIPT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of a page without scripts."""


@dataclass(frozen=True, eq=False)
class Component:
    """One component of CircuitsVis and what it shows.

    Args:
        name: Such as ``ColoredTokens``.
        props: Its properties, as values of JSON; NaN and infinity become null. Texts are made inert by `inert` before.
        caption: A line above it.

    Raises:
        ConfigError: a component that is not used here.
    """

    name: str
    props: Mapping[str, Any]
    caption: str = ""

    def __post_init__(self) -> None:
        if self.name not in _KNOWN:
            raise ConfigError(f"the component {self.name!r} was asked for. Give one of {', '.join(_KNOWN)}.")


@functools.cache
def bundle() -> str:
    """Return the JavaScript of the installed CircuitsVis, fit to stand inside a script element.

    Raises:
        ConfigError: it is not installed, or has no bundle.
    """
    try:
        source = resources.files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"the JavaScript of CircuitsVis is not there ({error}). Install circuitsvis>=1.43, or leave the interactive part out "
            "(page(interactive=False))."
        ) from error
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE)
    # A parser of HTML knows nothing of strings: "</script" ends the element, "<!--" with "<script" hides its end.
    return re.sub(r"<(/script|!--)", r"<\\\1", source, flags=re.IGNORECASE).replace("\r\n", "\n").strip()


def inert(piece: object) -> str:
    r"""Return a token or label for CircuitsVis, which takes it for HTML: no tag and no entity begins in it.

    A word joiner, which shows nothing, stands after every ``<`` and ``&``.

    >>> inert("<b>&lt;"), inert("a")
    ('<\u2060b>&\u2060lt;', 'a')
    """
    text = piece.text if isinstance(piece, Piece) else shown(piece)
    return text.replace("<", "<" + _JOINER).replace("&", "&" + _JOINER)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def script_json(value: Any) -> str:
    r"""Return JSON that may stand inside a script element: no tag, no entity, no NaN, ASCII alone.

    >>> script_json({"a": ["</script>", float("nan")]})
    '{"a":["\\u003c/script\\u003e",null]}'
    """
    text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode() + "'"


def policy(scripts: Sequence[str]) -> str:
    """Return the Content-Security-Policy that lets these scripts run, and nothing else."""
    if not scripts:
        return NO_SCRIPT_POLICY
    allowed = " ".join(_hash(script) for script in scripts)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def embedded(components: Sequence[Component]) -> tuple[str, list[str]]:
    """Return the places of components as HTML, and the scripts that fill them: the bundle, once, and the calls."""
    places, calls = [], []
    for number, component in enumerate(components):
        caption = f"<h2>{escape(component.caption)}</h2>" if component.caption else ""
        places.append(f'<section class="cv">{caption}<div id="cv-{number}"></div></section>')
        calls.append(f'CircuitsVis.render("cv-{number}",CircuitsVis.{component.name},{script_json(component.props)});')
    return "\n".join(places), [bundle(), "\n".join(calls)] if components else []
