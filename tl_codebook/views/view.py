"""What every ``show_`` function returns: a display for notebooks, and one HTML file."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from pathlib import Path

from tl_codebook.errors import ConfigError
from tl_codebook.files import replace_text, target_file
from tl_codebook.views.circuitsvis import Component, embedded, policy
from tl_codebook.views.visible import escape

__all__ = ["View"]

_PAGE_STYLE = """
:root{color-scheme:light dark}
body{margin:0 auto;max-width:76rem;padding:1.2rem 1.4rem 3rem;background:Canvas;color:CanvasText;
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.cv{background:#fff;color:#000;color-scheme:light;border:1px solid #8886;border-radius:6px;padding:.8rem 1rem;margin:1.4rem 0}
.cv h2{font-size:1rem;margin:0 0 .6rem}
"""


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """Codes as a notebook or a browser shows them. Nothing in it needs a network; what tokens and labels say is text and never runs.

    In a notebook it shows itself without any script, so that untrusted notebooks, GitHub and exports show the same. Say
    ``view.interactive()`` to have the CircuitsVis display beside it, in a frame of its own that cannot reach the notebook.

    Args:
        title: Of the page.
        text: The same as plain text.
        spans: The same as HTML without scripts, with its own style.
        components: What CircuitsVis shows in addition.
        with_frame: Whether a notebook gets the interactive part too.

    >>> view = View("Codes", "a b", "<b>a</b> b")
    >>> view, view._repr_html_()
    (View('Codes', no interactive part), '<b>a</b> b')
    >>> view.save(tmp_path / "codes.html").name
    'codes.html'
    """

    title: str
    text: str
    spans: str
    components: tuple[Component, ...] = ()
    with_frame: bool = False

    def __repr__(self) -> str:
        names = ", ".join(component.name for component in self.components) or "no interactive part"
        return f"View({self.title!r}, {names})"

    def __str__(self) -> str:
        return self.text

    @property
    def html(self) -> str:
        """Return the whole page, see `page`."""
        return self.page()

    def page(self, interactive: bool = True) -> str:
        """Return one HTML file that needs nothing else: what a notebook shows, then, if there is any, the interactive part.

        Args:
            interactive: False leaves the interactive part out, and with it every script: the file has kilobytes instead of 1.3 MB.

        Raises:
            ConfigError: CircuitsVis is not installed.

        >>> page = View("a < b", "", "<i>codes</i>").page()
        >>> "<title>a &lt; b</title>" in page, "<script" in page
        (True, False)
        """
        return self._page(self.spans, self.components if interactive else ())

    def _page(self, body: str, components: tuple[Component, ...]) -> str:
        places, scripts = embedded(components)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(scripts), quote=True)}">'
            '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">'
            f"<title>{escape(self.title)}</title><style>{_PAGE_STYLE}</style></head>\n"
            f'<body class="tlc-page">\n{body}\n{places}\n'
            + "".join(f"<script>{script}</script>\n" for script in scripts)
            + "</body></html>\n"
        )

    def interactive(self) -> View:
        """Return the view with its interactive part in notebooks too; it adds 1.3 MB to the notebook, each time it is shown.

        Raises:
            ConfigError: the view has none.

        >>> View("Codes", "", "").interactive()
        Traceback (most recent call last):
        tl_codebook.errors.ConfigError: the view 'Codes' has no interactive part: ... Show it as it is.
        """
        if not self.components:
            raise ConfigError(f"the view {self.title!r} has no interactive part: everything is in what it shows already. Show it as it is.")
        return dataclasses.replace(self, with_frame=True)

    def _repr_html_(self) -> str:
        if not self.with_frame:
            return self.spans
        inside = html.escape(self._page("", self.components), quote=True)
        return (
            f"{self.spans}\n<details><summary>Interactive (CircuitsVis)</summary>"
            '<iframe sandbox="allow-scripts" loading="lazy" style="width:100%;height:460px;border:1px solid #8888;background:#fff" '
            f'title="{escape(self.title)}" srcdoc="{inside}"></iframe></details>'
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": self.text, "text/html": self._repr_html_()}

    def save(self, path: str | Path, *, overwrite: bool = False, interactive: bool = True) -> Path:
        """Write the page as one HTML file, in one step, and return its path; it opens without a network.

        Args:
            path: The file, such as ``codes.html``.
            overwrite: Replace a file that is there.
            interactive: As for `page`.

        Raises:
            CheckpointExistsError: the file exists, and `overwrite` was not said.
            CheckpointError: it cannot be written there.
            ConfigError: CircuitsVis is not installed.

        >>> path = View("Codes", "", "<i>codes</i>").save(tmp_path / "codes.html")
        >>> View("Codes", "", "").save(path)
        Traceback (most recent call last):
        tl_codebook.errors.CheckpointExistsError: ...codes.html exists. Choose another name, or say overwrite=True.
        """
        target = target_file(path, overwrite)
        replace_text(target, self.page(interactive))
        return target
