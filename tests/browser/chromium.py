"""Headless Chromium from the command line: what a page becomes when its scripts have run, how it looks, what it asks the network for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--virtual-time-budget=8000",
)


def find() -> str | None:
    """Return the path of the browser, None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Visit:
    """What became of a page."""

    dom: str
    """The document after its scripts have run, without the scripts themselves."""
    asked: list[str]
    """URLs that were asked for, other than the file itself and data in it."""
    console: list[str]


def visit(address: str | Path, folder: Path, *flags: str) -> Visit:
    """Open a file or an address, and return what became of it."""
    profile, log = folder / "profile", folder / "net.json"
    shutil.rmtree(profile, ignore_errors=True)
    url = address.resolve().as_uri() if isinstance(address, Path) else address
    command = [str(find()), *FLAGS, f"--user-data-dir={profile}", f"--log-net-log={log}", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run([*command, *flags, "--dump-dom", url], capture_output=True, timeout=120, check=False)
    dom = done.stdout.decode("utf-8", "replace")
    console = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "CONSOLE" in line]
    return Visit(re.sub(r"<script>.*?</script>", "<script></script>", dom, flags=re.DOTALL), asked_for(log, url), console)


def asked_for(log: Path, own: str) -> list[str]:
    """Return the URLs that a page asked for, by the log of the network: none of the page itself, and none of the browser's own."""
    text = log.read_text(encoding="utf-8", errors="replace")
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    params = [event.get("params", {}) for event in events]
    # What the browser asks for on its own account (the time, its account) has no page as its initiator.
    urls = [str(each.get("url", "")) for each in params if each.get("initiator") not in (None, "not an origin")]
    return sorted({url for url in urls if re.match(r"(https?|wss?|ftp|file):", url) and url != own})


def picture(path: Path, png: Path, folder: Path, *flags: str, width: int = 800, height: int = 500) -> Path:
    """Take a picture of a page."""
    shutil.rmtree(folder / "profile", ignore_errors=True)
    command = [str(find()), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "--hide-scrollbars"]
    subprocess.run([*command, *flags, f"--screenshot={png}", path.resolve().as_uri()], capture_output=True, timeout=120, check=True)
    return png


OWNED = "document.documentElement.dataset.owned"
"""What a payload writes to, if it runs."""

PAYLOADS = [
    f"</script><script>{OWNED}=1</script>",
    "<!--<script>",
    f"<img src=x onerror={OWNED}=2>",
    f"<img/src='x'/onerror='{OWNED}=3'>",
    f"javascript:{OWNED}=4",
    f'"><svg onload={OWNED}=5>',
    f"'><svg/onload={OWNED}=6>",
    "{{7*7}}",
    "${7*7}",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    f"</style></title></textarea><img src=x onerror={OWNED}=7>",
    f"&lt;img src=x onerror={OWNED}=8&gt;",
    f"&#60;img src=x onerror={OWNED}=9&#62;",
    f"\\u003cimg src=x onerror={OWNED}=10\\u003e",
    "--></div></body></html>",
    "]]><![CDATA[",
    f'");{OWNED}=11;("',
    f"\u2028{OWNED}=12\u2029",
    "\u202etxt.exe\u2066\u200f",
    "nul\x00 and bell\x07",
    f"<iframe srcdoc='<script>parent.{OWNED}=13</script>'></iframe>",
    f"<details open ontoggle={OWNED}=14>",
    "<img src=http://127.0.0.1:1/canary>",
    "<link rel=stylesheet href=http://127.0.0.1:1/canary>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:1/canary'>",
    "<base href=http://127.0.0.1:1/><style>@import 'http://127.0.0.1:1/canary';</style>",
]
"""Texts that do harm where they are taken for HTML, for JavaScript, or for commands of a terminal."""


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data

    def named(self, *tags: str) -> list[dict[str, str]]:
        return [own for tag, own in self.found if tag in tags]

    def active(self) -> list[tuple[str, dict[str, str]]]:
        """Return what runs, loads or leads anywhere: none of it stands in a view without scripts."""
        tags = {
            "script",
            "iframe",
            "img",
            "link",
            "base",
            "object",
            "embed",
            "form",
            "a",
            "meta",
            "video",
            "audio",
            "input",
            "image",
            "use",
        }
        places = {"href", "src", "srcdoc", "action", "xlink:href", "data", "formaction", "background"}
        return [(tag, own) for tag, own in self.found if tag in tags or any(name.startswith("on") or name in places for name in own)]
