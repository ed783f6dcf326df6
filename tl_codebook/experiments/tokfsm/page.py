"""The frame of the report: one HTML file with its style inside, that needs no script and no network."""

from __future__ import annotations

from collections.abc import Sequence

from tl_codebook.experiments.tokfsm.charts import escape

__all__ = ["STYLE", "figure", "lines", "page", "table"]

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c2024; --soft: #565e66; --line: #d9dcdf; --panel: #f3f4f5;
  --own: #1f5fa8; --second: #8db8e6; --mark: #a3400a; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e7e9eb; --soft: #a6aeb6; --line: #363c42; --panel: #1e2327;
  --own: #6aa9ef; --second: #31547c; --mark: #f0a05c; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --panel: #fff;
  --own: #1f5fa8; --second: #8db8e6; --mark: #a3400a; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.2rem 0 .2rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 42rem; }
.lead, .note, figcaption, caption, dt { color: var(--soft); }
.note { font-size: .9rem; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; margin: .6rem 0;
  overflow-x: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem 1.5rem; margin: 1.2rem 0; }
dt { font-size: .84rem; } dd { margin: 0; font-size: .95rem; }
.key dd { font-size: 1.6rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.key dd small { display: block; font-size: .84rem; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; font-size: .9rem; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; font-weight: 400; }
thead th, thead th:first-child { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
.sub { display: inline-block; padding-left: 1.2em; color: var(--soft); }
td.last { font-weight: 600; }
figure { margin: .8rem 0; display: grid; grid-template-columns: minmax(0, 32rem) minmax(0, 1fr); gap: .5rem 2rem; }
figcaption { font-size: .92rem; } figcaption p:first-child { margin-top: 0; color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { font-size: 12.5px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .axis { fill: var(--soft); font-size: 11.5px; }
svg .head { font-weight: 600; stroke: var(--paper); stroke-width: 5px; paint-order: stroke; }
.grid { stroke: var(--line); stroke-width: 1; } .reference { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3; }
.bar { stroke-width: 1.2; } .own { fill: var(--own); } .second { fill: var(--second); stroke: var(--own); }
.control { fill: none; stroke: var(--soft); stroke-dasharray: 3 2; } .faint { fill-opacity: .45; }
.published, .mark { fill: var(--mark); } .published { stroke: var(--mark); stroke-width: 2; } .legend { white-space: nowrap; }
.legend svg { display: inline-block; width: 1.3em; height: 1em; vertical-align: -.12em; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); padding: .2rem 0; }
:focus-visible { outline: 2px solid var(--own); outline-offset: 3px; }
@media (max-width: 48rem) { body { padding: 1.2rem 1rem 3rem; } h1 { font-size: 1.4rem; } figure { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: .28rem .35rem; } table { font-size: .85rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, .panel { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } h2, h3 { break-after: avoid; } details:not([open]) { display: none; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole page; the body is HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><meta name="color-scheme" content="light dark"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def lines(text: str) -> str:
    """Return text that keeps its lines and spaces."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def figure(chart: str, caption: Sequence[str]) -> str:
    """Return a chart with its explanation, a paragraph each; both are HTML already."""
    return f"<figure><div>{chart}</div><figcaption>{''.join(f'<p>{text}</p>' for text in caption)}</figcaption></figure>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table of values, of which the first of a row is its name; a name with spaces before it is indented.

    What is empty, None or not finite is a dash.
    """
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for name, *values in rows:
        sub = ' class="sub"' if str(name).startswith(" ") else ""
        last = len(values) - 1
        looks = [' class="last"' if index == last else "" for index in range(len(values))]
        line = "".join(f"<td{look}>{escape(None if value == '' else value)}</td>" for look, value in zip(looks, values, strict=True))
        lines.append(f'<tr><th scope="row"><span{sub}>{escape(str(name).strip())}</span></th>{line}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
