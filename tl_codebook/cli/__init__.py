"""The command line: ``tl-codebook <verb> ...``, one small file a verb."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence

from tl_codebook import __version__
from tl_codebook.characters import without_hostile
from tl_codebook.errors import CodebookError

__all__ = ["VERBS", "main"]

VERBS = {
    "tokfsm": "Train a model and its codes on a finite state machine, and check the codes against it. Nothing to download.",
    "train": "Attach codebooks to a language model, train them, and report what they cost.",
    "collect": "Run a codebook model over texts and write down which codes fire where, in a store that searches read.",
    "search": "Find the codes of a store that stand for a regular expression, for tokens, or for one example.",
    "describe": "Say what a code stands for and does, or label all codes of a store.",
    "graph": "Join the codes of a store that fire together more often than chance has it.",
    "convert": "Bring in a checkpoint of codebook-features, or take a trained model back to Hugging Face.",
    "bench": "Measure what a snap costs on this machine, beside the plain ways to write it.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 where tl_codebook raised, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"tl-codebook {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in VERBS:
        wrong = bool(arguments) and arguments[0] not in ("-h", "--help")
        lines = ["usage: tl-codebook <verb> [options]", "", *(f"  {verb:<10} {what}" for verb, what in VERBS.items()), ""]
        lines.append("tl-codebook <verb> --help says more of one.")
        if wrong:
            lines.insert(0, f"tl-codebook: no verb {arguments[0]!r}.")
        print("\n".join(lines), file=sys.stderr if wrong else sys.stdout)
        return 2 if wrong else 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its number
    try:
        status: int = importlib.import_module(f"tl_codebook.cli.{arguments[0]}").run(arguments[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read it has read enough, as head does; nothing is left to write at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CodebookError as error:
        said = re.sub(r"\b(overwrite|resume|measure)=True\b", r"--\1", str(error))
        print("tl-codebook", f"{arguments[0]}:", without_hostile(said, keep="\n"), file=sys.stderr)
        return 1
