"""Labels of codes as rows and as files: written with the hash of the codes that they are about, read without believing anything.

A label is text, whatever it says: nothing in it is run or formatted, and what would act on a terminal or a page is no label.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, overload

from tl_codebook import files
from tl_codebook.characters import hostile
from tl_codebook.errors import BasisMismatchError, CheckpointError, DataError, InvalidCodeError, LabelError
from tl_codebook.files import target_file
from tl_codebook.names import Code, CodeLike, as_code
from tl_codebook.store.sites import stored_code

__all__ = ["CodeLabel", "CodeLabels", "Kind", "read_labels", "replace_inert_json", "write_labels"]

FORMAT, VERSION = "tl_codebook.labels", 1
Kind = Literal["regex", "token", "previous token", "next token", "other"]

_LONGEST, _LARGEST = 2000, 1 << 28  # characters of a label, bytes of a file
_HASH = re.compile(r"[0-9a-f]{64}")
_ABOUT = ("n_codes", "n_dead", "n_rare", "min_precision", "min_count")


@dataclass(frozen=True)
class CodeLabel:
    """What one code stands for, and how well. ``pandas.DataFrame(labels)`` is a table of them.

    Raises:
        LabelError: a code that is none; a text that is empty, longer than 2,000 characters, or holds what acts or hides (control
            characters, ends of a line, marks that turn the direction of writing, what has no width), which no label may bring to a terminal
            or a page; figures that cannot be.

    >>> CodeLabel("L3.mlp_out:417", "the word after 'the'").code.layer
    3
    """

    label: str
    """The code: ``L3.mlp_out:417``."""
    text: str
    """What it stands for, one line."""
    kind: Kind = "other"
    """What was tested; ``"other"`` for labels by hand and from elsewhere."""
    precision: float | None = None
    """Share of the code's firings at which the label holds, 0 to 1, on the half that did not choose it; None where not measured."""
    recall: float | None = None
    """Share of the places at which the label holds where the code fires, 0 to 1, on that half too."""
    f1: float | None = None
    """Harmonic mean of the two."""
    n_train: int | None = None
    """Positions at which the code fires in the half that chose the label."""
    n_held_out: int | None = None
    """Positions at which it fires where precision was measured: in the other half, of imported labels everywhere."""
    pattern: str | None = None
    """The regular expression, where one was tested."""
    tokens: tuple[int, ...] = ()
    """The token ids, where the label is about tokens."""

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise LabelError(f"the code {self.label!r:.80} is a {type(self.label).__name__}. Give a label such as 'L3.mlp_out:417'.")
        Code.parse(self.label)
        if not isinstance(self.text, str) or not self.text.strip() or len(self.text) > _LONGEST or any(map(hostile, self.text)):
            raise LabelError(
                f"{self.label} was to be labelled {self.text!r:.120}. Give 1 to {_LONGEST:,} characters in one line, with what acts or "
                "hides (control characters, marks of direction, what has no width) written out (\\n)."
            )
        if self.kind not in get_args(Kind):
            raise LabelError(f"{self.label}: kind={self.kind!r:.80} was given. Give one of {', '.join(map(repr, get_args(Kind)))}.")
        for name in ("precision", "recall", "f1"):
            self._check(name, "a share from 0 to 1", lambda value: isinstance(value, int | float) and 0 <= value <= 1)
        for name in ("n_train", "n_held_out"):
            self._check(name, "a whole number >= 0", lambda value: isinstance(value, int) and value >= 0)
        self._check("pattern", "a str", lambda value: isinstance(value, str))
        whole = all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in self.tokens)
        if not isinstance(self.tokens, tuple) or not whole:
            raise LabelError(f"{self.label}: tokens={self.tokens!r:.80} was given. Give a tuple of token ids.")

    def _check(self, name: str, what: str, fits: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not fits(value)):
            raise LabelError(f"{self.label}: {name}={value!r:.80} was given. Give {what}, or None.")

    @property
    def code(self) -> Code:
        """Return the code, which every function takes that takes a label."""
        return Code.parse(self.label)


class CodeLabels(Sequence[CodeLabel]):
    """Labels of codes, each code once, in the order of the codes; and how many codes have none.

    Args:
        rows: The labels.
        n_codes: Codes that could have had one; None where not known.
        n_dead: Those of them that never fire on text.
        n_rare: Those that fire, but in either half less often than `min_count`.
        min_precision, min_count: What was asked of a label.
        codes_sha256: Hash of the codes of each hook name, by which labels of other codes are told.

    Raises:
        LabelError: two labels of one code.

    >>> labels = CodeLabels([CodeLabel("L0.mlp_out:3", "comma"), CodeLabel("L0.mlp_out:1", "full stop")])
    >>> labels["L0.mlp_out:3"].text, labels[0].label, labels.get("L1.mlp_out:0")
    ('comma', 'L0.mlp_out:1', None)
    """

    def __init__(
        self,
        rows: Iterable[CodeLabel],
        *,
        n_codes: int | None = None,
        n_dead: int | None = None,
        n_rare: int | None = None,
        min_precision: float | None = None,
        min_count: int | None = None,
        codes_sha256: Mapping[str, str] | None = None,
    ) -> None:
        self._rows = tuple(sorted(rows, key=lambda row: row.code))
        self._by_code = {row.code: row for row in self._rows}
        if len(self._by_code) < len(self._rows):
            twice = next(a.label for a, b in zip(self._rows, self._rows[1:], strict=False) if a.code == b.code)
            raise LabelError(f"{twice} was given more than one label. Give each code once.")
        self.n_codes, self.n_dead, self.n_rare = n_codes, n_dead, n_rare
        self.min_precision, self.min_count = min_precision, min_count
        self.codes_sha256 = dict(codes_sha256 or {})

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> CodeLabels:
        """Make labels by hand: code -> text.

        >>> print(CodeLabels.from_texts({"L0.mlp_out:3": "comma"}))
        1 labels of codes
          L0.mlp_out:3  comma
        """
        return cls(CodeLabel(str(code), text) for code, text in texts.items())

    @property
    def n_labelled(self) -> int:
        """Return how many codes have a label."""
        return len(self._rows)

    @property
    def n_unlabelled(self) -> int | None:
        """Return how many codes have none, the dead and the rare among them; None where it is not known how many codes there are."""
        return None if self.n_codes is None else self.n_codes - len(self._rows)

    def get(self, code: CodeLike) -> CodeLabel | None:
        """Return the label of a code, None where it has none."""
        return self._by_code.get(as_code(code))

    @overload
    def __getitem__(self, key: int | CodeLike) -> CodeLabel: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[CodeLabel, ...]: ...
    def __getitem__(self, key: Any) -> CodeLabel | tuple[CodeLabel, ...]:
        if not isinstance(key, str) and not hasattr(key, "code"):
            return self._rows[key]
        found = self.get(key)
        if found is None:
            raise InvalidCodeError(f"{as_code(key)} has no label here. For such a code, get({str(as_code(key))!r}) returns None.")
        return found

    def __contains__(self, item: object) -> bool:
        return self.get(item) is not None if isinstance(item, str | Code) else item in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[CodeLabel]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodeLabels) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._head()}>"

    def __str__(self) -> str:
        lines = [f"  {row.label}  {row.text}{_figures(row)}" for row in self._rows[:10]]
        more = [f"  ... and {len(self) - 10:,} more"] if len(self) > 10 else []
        return "\n".join([self._head(), *lines, *more])

    def _head(self) -> str:
        if self.n_codes is None:
            return f"{len(self):,} labels of codes"
        head = f"{len(self):,} of {self.n_codes:,} codes labelled"
        if self.min_precision is not None:
            head += f" (held-out precision {self.min_precision:g} or more)"
        head += f", {self.n_unlabelled:,} unlabelled"
        rarely = "fire too rarely" if self.min_count is None else f"fire fewer than {self.min_count} times in a half"
        known = [f"{n:,} {what}" for n, what in ((self.n_dead, "never fire"), (self.n_rare, rarely)) if n is not None]
        return head + (f", of which {' and '.join(known)}" if known else "")


def _figures(row: CodeLabel) -> str:
    known = [f"{name} {value:.3f}" for name, value in (("precision", row.precision), ("recall", row.recall)) if value is not None]
    return f"  ({', '.join(known)})" if known else ""


def replace_inert_json(path: Path, content: Any) -> None:
    """Write JSON in one step, ASCII alone, and so that it can stand inside a page: no ``<``, ``>`` or ``&`` as such, no NaN."""
    text = json.dumps(content, indent=1, allow_nan=False)
    for character in "<>&":  # these stand in strings alone
        text = text.replace(character, f"\\u{ord(character):04x}")
    files.replace_text(path, text + "\n")


def write_labels(labels: CodeLabels | Mapping[str, str], path: str | Path, *, store: Any = None, overwrite: bool = False) -> None:
    """Write labels as JSON, in one step, with the hash of the codes that they are about.

    Args:
        labels: Those of `label_codes` or `read_labels`, or by hand: code -> text.
        path: The file.
        store: A store of these codes, whose hashes are written; by default those that the labels came with (by hand there are none).
        overwrite: Replace a file that is there.

    Raises:
        LabelError: a code or text that cannot be.
        UnknownHookError, InvalidCodeError, BasisMismatchError: labels of codes that the store does not have.
        CheckpointExistsError: the file exists, and `overwrite` was not said.
        CheckpointError: it cannot be written there.

    >>> write_labels({"L0.mlp_out:3": "comma"}, tmp_path / "labels.json")
    >>> read_labels(tmp_path / "labels.json")["L0.mlp_out:3"].text
    'comma'
    """
    labels = labels if isinstance(labels, CodeLabels) else CodeLabels.from_texts(labels)
    if store is not None:
        labels = _of_store(labels, store, "these labels")
    target = target_file(path, overwrite)
    head = {"format": FORMAT, "version": VERSION, "codes_sha256": labels.codes_sha256}
    rows = [{key: value for key, value in dataclasses.asdict(row).items() if value not in (None, ())} for row in labels]
    replace_inert_json(target, head | {name: getattr(labels, name) for name in _ABOUT} | {"labels": rows})


def _of_store(labels: CodeLabels, store: Any, what: str) -> CodeLabels:
    """Return labels with the hashes of a store, refusing those of codes that it does not have."""
    hashes, rows = store.manifest["codes_sha256"], []
    for row in labels:
        label = str(stored_code(store.sites, row.code))
        rows.append(row if label == row.label else dataclasses.replace(row, label=label))
    used = dict.fromkeys(row.code.hook_name for row in labels) | dict.fromkeys(name for name in labels.codes_sha256 if name in hashes)
    other = [name for name in used if name in labels.codes_sha256 and labels.codes_sha256[name] != hashes.get(name)]
    if other:
        raise BasisMismatchError(
            f"{what} are about other codes than {store.path} holds, at {', '.join(other)}. Label the codes of this store, or open "
            "the store that the labels were made with."
        )
    about = {name: getattr(labels, name) for name in _ABOUT}
    return CodeLabels(rows, **about, codes_sha256={name: hashes[name] for name in used if name in hashes})


def read_labels(path: str | Path, store: Any = None) -> CodeLabels:
    """Read labels from a file: of `write_labels`, by hand, of the original library, or of Neuronpedia; it is recognised by its content.

    By hand it is a JSON object of codes and texts: ``{"L3.mlp_out:417": "comma"}``. Of the original, a list of ``CodeInfo`` as objects:
    ``description`` (or else ``regex``) is the label, ``cb_at`` one of its places; where that is ``attn`` or ``mlp`` and the store has codes
    at z or post alone there, these are meant. Of Neuronpedia, a feature or a list of features with ``explanations``, or a list of
    explanations (also as .jsonl, one a line): ``layer`` has the form that `write_neuronpedia` writes (``5-z-2``), several explanations of
    one feature are joined, features without one are left out. In labels from elsewhere control characters are written out.

    Args:
        path: The file, at most 256 MiB.
        store: A store to hold the labels against: their codes have to be in it, and be the same codes.

    Raises:
        CheckpointError: no such file; one that is damaged, of another format or a newer version, with unknown or repeated keys, NaN, or
            values that cannot be.
        UnknownHookError, InvalidCodeError, BasisMismatchError: labels of codes that the store does not have.

    >>> _ = (tmp_path / "mine.json").write_text('{"L0.mlp_out:3": "comma", "L1.z.2:7": "once upon a"}')
    >>> read_labels(tmp_path / "mine.json")["L1.z.2:7"].text
    'once upon a'
    """
    source = files.as_path(path)
    content = _parsed(source)
    try:
        if isinstance(content, dict) and "format" in content:
            labels = _own(source, content)
        elif isinstance(content, dict) and content and all(isinstance(text, str) and ":" in code for code, text in content.items()):
            labels = CodeLabels.from_texts(content)
        else:
            from tl_codebook.describe.export import imported

            labels = CodeLabels(imported(content if isinstance(content, list) else [content], store))
    except (LabelError, DataError, InvalidCodeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    return labels if store is None else _of_store(labels, store, f"the labels in {source}")


def _refuse(source: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{source}: {why}")


def _parsed(source: Path) -> Any:
    """Read JSON strictly, of a .jsonl file each line."""

    def parse(text: str) -> Any:
        return files.strict_json(text, source, "Correct the file: each key once, and null for what is not known.")

    try:
        if (size := source.stat().st_size) > _LARGEST:
            _refuse(source, f"it has {size:,} bytes, labels have at most {_LARGEST:,}. Give a file of labels.")
        text = source.read_text(encoding="utf-8")
        return [parse(line) for line in text.split("\n") if line.strip()] if source.suffix == ".jsonl" else parse(text)
    except FileNotFoundError:
        _refuse(source, "there is no such file. Give one that write_labels wrote.")
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        _refuse(source, f"it cannot be read as JSON ({str(error)[:200]}). It is incomplete or damaged: copy it again.")


_FIELDS = {field.name for field in dataclasses.fields(CodeLabel)}


def _own(source: Path, content: dict[str, Any]) -> CodeLabels:
    """Read what `write_labels` wrote."""
    if content["format"] != FORMAT:
        _refuse(source, f"its format is {content['format']!r:.80}, not {FORMAT!r}. Give a file that write_labels wrote.")
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        _refuse(source, f"its version is {version!r:.80}. Write it again with write_labels.")
    if version > VERSION:
        _refuse(source, f"it is of version {version}, this release reads {VERSION}. Use the release that wrote it.")
    expected = {"format", "version", "codes_sha256", "labels", *_ABOUT}
    if content.keys() != expected:
        missing, unknown = sorted(expected - content.keys()), [key[:80] for key in sorted(content.keys() - expected)]
        _refuse(source, f"missing keys: {missing}, unknown keys: {unknown}. Write it again with write_labels.")
    hashes, entries = content["codes_sha256"], content["labels"]
    if not isinstance(hashes, dict) or not all(isinstance(value, str) and _HASH.fullmatch(value) for value in hashes.values()):
        _refuse(source, "codes_sha256 does not give a hash for each hook name. Write it again with write_labels.")
    if not isinstance(entries, list):
        _refuse(source, f"labels is a {type(entries).__name__}, not a list. Write it again with write_labels.")
    about = {name: content[name] for name in _ABOUT}
    for name, value in about.items():
        fits = isinstance(value, int | float) and 0 <= value <= 1 if name == "min_precision" else isinstance(value, int) and value >= 0
        if value is not None and (isinstance(value, bool) or not fits):
            _refuse(source, f"{name} is {value!r:.80}. Write it again with write_labels.")
    if about["n_codes"] is not None and about["n_codes"] < len(entries) + (about["n_dead"] or 0) + (about["n_rare"] or 0):
        _refuse(source, f"{len(entries)} labels and the codes without are more than {about['n_codes']} codes. Write it again.")
    return CodeLabels([_row(source, number, entry) for number, entry in enumerate(entries)], **about, codes_sha256=hashes)


def _row(source: Path, number: int, entry: Any) -> CodeLabel:
    if not isinstance(entry, dict) or not entry.keys() <= _FIELDS or not {"label", "text", "kind"} <= entry.keys():
        what = sorted(key[:80] for key in entry) if isinstance(entry, dict) else repr(entry)[:80]
        _refuse(source, f"label {number} has {what}. It needs label, text and kind, and may have {sorted(_FIELDS)}.")
    tokens = entry.get("tokens", [])
    if not isinstance(tokens, list):
        _refuse(source, f"label {number} has the tokens {tokens!r:.80}. Write a list of token ids.")
    return CodeLabel(**entry | {"tokens": tuple(tokens)})
