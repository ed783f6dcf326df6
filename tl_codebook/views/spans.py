"""HTML without scripts: tokens as coloured spans, in a fragment that brings its own style and leaves that of the page alone."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable, Sequence

from tl_codebook.views.colours import N_LEVELS, colour_rules
from tl_codebook.views.visible import Piece, escape

__all__ = ["SCOPE", "fragment", "legend", "line_of", "note", "parts_of", "style", "text_block", "token_span"]

SCOPE = "tlc-view"
"""Class of every fragment; all rules of its style are under it."""

_DARK_SCOPE = f':is([data-jp-theme-light="false"],.vscode-dark,.vscode-high-contrast,html[theme="dark"]) .{SCOPE}'
"""A notebook says in one of these ways that it is dark; that the system prefers dark says nothing about it."""
_PAGE_SCOPE = f".tlc-page .{SCOPE}"
_RULES = """
S{font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:inherit;max-width:100%;
  margin:.4em 0;overflow-wrap:anywhere}
S .title{font-size:1.12em;font-weight:600;margin:.2em 0 .5em}
S .head{font-weight:600;margin:1em 0 .25em}
S .head .say{font-weight:400}
S .note,S .place,S .say{opacity:.78;font-size:.92em}
S .note{margin:.3em 0}
S .text{font:13.5px/1.95 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;margin:.2em 0 .5em}
S .text.tight{line-height:1.7;margin:0}
S .t{unicode-bidi:isolate;border-radius:3px;padding:2px 0;margin:0;background:none;color:inherit;
  box-decoration-break:clone;-webkit-box-decoration-break:clone;box-shadow:inset 1px 0 0 rgba(128,128,128,.28)}
S .fires{text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:4px}
S mark.t{font-weight:700;outline:2px solid currentColor;outline-offset:-1px}
S .codes{line-height:2.7;overflow-x:auto}
S ruby{ruby-position:under;white-space:pre;overflow-wrap:normal}
S rt{font-size:9.5px;line-height:1.2;padding:0 .35em;opacity:.85}
S .special{font-style:italic}
S .nan{background:repeating-linear-gradient(45deg,transparent 0 4px,rgba(128,128,128,.45) 4px 7px)}
S .m{font-style:normal;font-size:.86em}
S .row{display:grid;grid-template-columns:8.5em minmax(0,1fr);gap:.9em;padding:.28em 0;border-top:1px solid rgba(128,128,128,.28)}
S .place{font-variant-numeric:tabular-nums;padding-top:.25em}
S .key{display:inline-block;min-width:1.15em;padding:0 .35em;border-radius:3px;text-align:center;font-variant-numeric:tabular-nums}
S .scroll{overflow-x:auto}
S svg{display:block;font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;max-width:none}
S svg text{fill:currentColor}
S svg text.on{font-weight:600}
S svg .box{fill:none;stroke:currentColor;stroke-opacity:.35}
S svg .band{fill:currentColor;fill-opacity:.06}
S svg .faint{opacity:.7}
S svg .mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre}
S svg .edge{fill:none;stroke:#c05a12;stroke-opacity:.55}
S svg .edge:hover{stroke-opacity:1}
S svg .less{stroke:#3b6fb5;stroke-dasharray:5 4}
S .grid{display:flex;flex-wrap:wrap;gap:1.2em 2em;align-items:flex-start}
S figure{margin:0}
S figcaption{font-weight:600;margin-bottom:.2em}
"""


@functools.cache
def style() -> str:
    """Return the rules of a fragment: light ones, and dark ones where the notebook or the page is dark."""
    scope = f".{SCOPE}"
    plain = "".join(scope if letter == "S" and _starts_rule(_RULES, i) else letter for i, letter in enumerate(_RULES))
    page = colour_rules(_PAGE_SCOPE, dark=True)
    dark = f"{colour_rules(_DARK_SCOPE, dark=True)}\n@media (prefers-color-scheme:dark){{\n{page}\n}}\n"
    return f"{plain}{colour_rules(scope, dark=False)}\n{dark}"


def _starts_rule(rules: str, index: int) -> bool:
    return rules[index - 1] in "\n," and rules[index + 1] in " {"


def parts_of(piece: Piece, *, breaks: bool = True) -> str:
    """Return what is shown of a token as HTML; with ``breaks=False`` in one line."""
    found = []
    for kind, text in piece.parts:
        found.append(html.escape(text, quote=True) if kind == "text" else f'<i class="m">{html.escape(text, quote=True)}</i>')
        if kind == "line" and breaks:
            found.append("<br>")
    return "".join(found)


def token_span(
    piece: Piece, colour: str = "", said: Sequence[str] = (), *, fires: bool = False, marked: bool = False, breaks: bool = True
) -> str:
    """Return a token as a span.

    Args:
        piece: The token.
        colour: A class of `colour_rules`, ``nan``, or empty for none.
        said: Lines of its tooltip, after the token and its id.
        fires: Underline it.
        marked: Frame it, as the token that an example is about.
        breaks: Break lines where the token does.

    >>> from tl_codebook.views.visible import Part
    >>> token_span(Piece(7, (Part("text", "<b>"),)), "a3", ["slot 0"])
    '<span class="t a3" title="&lt;b&gt;&#10;id 7&#10;slot 0">&lt;b&gt;</span>'
    """
    names = ["t", *([colour] if colour else []), *(["fires"] if fires else []), *(["special"] if piece.special else [])]
    title = "&#10;".join(escape(line) for line in [piece.text, f"id {piece.id}", *said])
    tag = "mark" if marked else "span"
    return f'<{tag} class="{" ".join(names)}" title="{title}">{parts_of(piece, breaks=breaks)}</{tag}>'


def text_block(spans: Iterable[str], *, tight: bool = False) -> str:
    """Return spans as a block of text that keeps its spaces."""
    return f'<div class="text{" tight" if tight else ""}">{"".join(spans)}</div>'


def note(text: object) -> str:
    """Return a line of small text."""
    return f'<div class="note">{escape(text)}</div>'


def legend(low: object, high: object, levels: Iterable[int] = range(1, N_LEVELS + 1, 3)) -> str:
    """Return the key of the scale: what no colour means, and what the full one does."""
    keys = "".join(f'<span class="key a{level}">&#8203;</span>' for level in levels)
    return f'<div class="note">{escape(low)} {keys} {escape(high)}</div>'


def fragment(title: object, body: Iterable[str]) -> str:
    """Return a piece of HTML with its style, for a notebook or a page; the body is HTML already."""
    return f'<div class="{SCOPE}"><style>{style()}</style>\n<div class="title">{escape(title)}</div>\n' + "\n".join(body) + "\n</div>"


def line_of(pieces: Sequence[Piece], marked: Iterable[int] = ()) -> str:
    """Return tokens as one line of plain text, those that are marked in brackets.

    >>> from tl_codebook.views.visible import Part
    >>> line_of([Piece(1, (Part("text", "New"),)), Piece(2, (Part("text", " York"),))], marked=[1])
    'New⟦ York⟧'
    """
    inside = set(marked)
    return "".join(f"\u27e6{piece.text}\u27e7" if i in inside else piece.text for i, piece in enumerate(pieces))
