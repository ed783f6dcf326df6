"""The exact bytes of every token, and from them the text of tokens and the tokens of a text.

Positions in a text are carried over by bytes: a character that takes several tokens (an emoji of a byte-level tokenizer) belongs to all
of them, and a token that ends inside a character moves nothing after it.
"""

from __future__ import annotations

import codecs
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from tl_codebook import files
from tl_codebook.errors import CheckpointError, DataError
from tl_codebook.store.manifest import open_array

__all__ = ["Text", "Vocabulary", "check_text", "decode", "load_vocabulary", "save_vocabulary", "vocabulary_of"]

_BYTES, _OFFSETS = "vocabulary.bytes.npy", "vocabulary.offsets.npy"


class Text(NamedTuple):
    """A text and where its characters lie in the bytes that it was decoded from."""

    text: str
    starts: Int64[np.ndarray, " character_and_one"] | None
    """First byte of each character, and the number of bytes; None where every character is one byte."""

    def byte_of(self, characters: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """Return the first byte of characters; of the one after the last, the number of bytes."""
        return characters if self.starts is None else self.starts[characters]


def decode(data: bytes) -> Text:
    """Decode UTF-8, with U+FFFD for what is none (as ``errors="replace"``), and say where each character begins.

    >>> decode("né".encode() + bytes([0xF0, 0x9F]) + b"!")
    Text(text='né�!', starts=array([0, 1, 3, 5, 6]))
    """
    if data.isascii():
        return Text(data.decode(), None)
    view, parts, starts, position = memoryview(data), [], [], 0
    everything = np.frombuffer(data, np.uint8)
    while position < len(data):
        try:
            text, stop, after = codecs.utf_8_decode(view[position:], "strict", True)[0], len(data), len(data)
        except UnicodeDecodeError as error:
            stop, after = position + error.start, position + error.end
            text = codecs.utf_8_decode(view[position:stop], "strict", True)[0]
        parts.append(text)
        starts.append(position + np.flatnonzero((everything[position:stop] & 0xC0) != 0x80))
        if after > stop:
            parts.append("\ufffd")
            starts.append(np.array([stop]))
        position = after
    return Text("".join(parts), np.concatenate([*starts, np.array([len(data)])]).astype(np.int64))


class Vocabulary:
    """The bytes that each token id stands for; a token without text (one that the tokenizer does not know) has none.

    Args:
        data: The bytes of all tokens, one after the other.
        offsets: Where each token begins in `data`, and its length.

    Raises:
        DataError: offsets that do not cut `data`.

    >>> words = Vocabulary.of_pieces([b"New", b" York"])
    >>> words.bytes_of(1), words.ids_of(" York"), words.text(np.array([0, 1, 0])).text
    (b' York', [1], 'New YorkNew')
    """

    def __init__(self, data: UInt8[np.ndarray, " byte"], offsets: Int64[np.ndarray, " token_and_one"]) -> None:
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
            raise DataError(
                f"{len(offsets)} offsets were given with {len(data)} bytes, which they do not cut. Give the beginning of every token, "
                "ascending from 0, and the number of bytes at the end."
            )
        self.data, self.offsets = data, offsets

    @classmethod
    def of_pieces(cls, pieces: Sequence[bytes]) -> Vocabulary:
        """Make a vocabulary of the bytes of each token."""
        offsets = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(pieces), np.uint8), offsets)

    @property
    def n_tokens(self) -> int:
        """Return how many token ids there are."""
        return len(self.offsets) - 1

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of one token.

        Raises:
            DataError: an id that is not one of the vocabulary.
        """
        self._check(np.array([token]))
        return self.data[self.offsets[token] : self.offsets[token + 1]].tobytes()

    def ids_of(self, text: str) -> list[int]:
        """Return the ids of all tokens that are exactly this text, none where it is no token.

        Some tokenizers have several, such as one as a byte and one as a character.
        """
        wanted = text.encode("utf-8", "surrogatepass")
        lengths = np.diff(self.offsets)
        same = np.flatnonzero(lengths == len(wanted)).tolist() if wanted else []
        return [token for token in same if self.bytes_of(token) == wanted]

    def join(self, tokens: Integer[np.ndarray, " token"]) -> tuple[bytes, Int64[np.ndarray, " token"]]:
        """Return the bytes of a sequence of tokens, and where each token ends in them.

        Raises:
            DataError: an id that is not one of the vocabulary.
        """
        tokens = np.asarray(tokens)
        self._check(tokens)
        begins = self.offsets[tokens]
        lengths = self.offsets[tokens.astype(np.int64) + 1] - begins
        ends = np.cumsum(lengths)
        places = np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)
        return self.data[places].tobytes(), ends

    def text(self, tokens: Integer[np.ndarray, " token"]) -> Text:
        """Return the text of a sequence of tokens.

        Raises:
            DataError: an id that is not one of the vocabulary.
        """
        return decode(self.join(tokens)[0])

    def _check(self, tokens: np.ndarray) -> None:
        wrong = tokens[(tokens < 0) | (tokens >= self.n_tokens)]
        if wrong.size:
            raise DataError(
                f"token {int(wrong[0])} is asked for, but the vocabulary has {self.n_tokens}, 0 to {self.n_tokens - 1}. "
                "Give the vocabulary of the tokenizer that wrote these tokens."
            )


def vocabulary_of(tokenizer: Any, n_tokens: int | None = None) -> Vocabulary:
    """Return the bytes of every token of a Hugging Face tokenizer.

    Byte-level tokenizers (GPT-2, NeoX, Llama 3) are read by the byte table, sentencepiece ones (Llama, T5) by the mark of a space and
    their byte tokens. Of any other, a token stands for what it adds when decoded after another token; a text of such a tokenizer, and of
    sentencepiece, begins with a space that the tokenizer itself leaves out.

    Args:
        tokenizer: Fast or slow.
        n_tokens: Ids to give at least, where the model has more rows than the tokenizer has tokens; these have no text.

    >>> from tl_codebook.experiments.tokfsm import TokFSM, make_tokenizer
    >>> vocabulary_of(make_tokenizer(TokFSM.paper())).text(np.array([0, 4, 1, 3])).text
    '0413'
    """
    ids = set(tokenizer.get_vocab().values())
    pieces = [b""] * max(max(ids, default=0) + 1, n_tokens or 0)
    bytes_of = _reader(tokenizer)
    added = {int(token): str(text) for token, text in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    for token in ids:
        # An added token is written as the text that it stands for, whatever the others are written in.
        pieces[token] = added[token].encode() if token in added else bytes_of(token)
    return Vocabulary.of_pieces(pieces)


def _reader(tokenizer: Any) -> Callable[[int], bytes]:
    """Return what gives the bytes of a token that is none of the added ones."""
    steps = _decoder(tokenizer)
    names = {step.get("type") for step in steps}

    def piece(token: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(token))

    if "ByteLevel" in names or getattr(tokenizer, "byte_decoder", None):
        table = _byte_of()

        def byte_level(token: int) -> bytes:
            values = [table.get(character) for character in piece(token)]
            return piece(token).encode() if None in values else bytes(value for value in values if value is not None)

        return byte_level
    replaced = [(step["replacement"], " ") for step in steps if step.get("type") == "Metaspace"]
    replaced += [(step["pattern"]["String"], step["content"]) for step in steps if "String" in (step.get("pattern") or {})]
    known = names <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if (replaced and known) or hasattr(tokenizer, "sp_model"):
        fallback = "ByteFallback" in names or hasattr(tokenizer, "sp_model")
        replaced = replaced or [("\u2581", " ")]

        def sentencepiece(token: int) -> bytes:
            text = piece(token)
            if fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            for old, new in replaced:
                text = text.replace(old, new)
            return text.encode()

        return sentencepiece
    return _by_decoding(tokenizer)


def _by_decoding(tokenizer: Any) -> Callable[[int], bytes]:
    def written(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    special = set(tokenizer.all_special_ids)
    first = next((token for token in sorted(tokenizer.get_vocab().values()) if token not in special and written([token]).isalnum()), None)

    def after_another(token: int) -> bytes:
        if first is not None:
            pair, alone = written([first, token]), written([first])
            if pair.startswith(alone):
                return pair[len(alone) :].encode()
        return str(tokenizer.convert_tokens_to_string([tokenizer.convert_ids_to_tokens(token)])).encode()

    return after_another


def _decoder(tokenizer: Any) -> list[dict[str, Any]]:
    """Return the steps by which a fast tokenizer decodes, none for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(backend, "decoder", None) is None:
        return []
    step = json.loads(backend.decoder.__getstate__())
    return step["decoders"] if step.get("type") == "Sequence" else [step]


def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for: printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def check_text(vocabulary: Vocabulary, tokenizer: Any, tokens: Integer[np.ndarray, " token"]) -> None:
    """Raise unless a tokenizer decodes tokens to the text that the vocabulary gives them; special tokens are left out of both.

    Tokens at either end that hold only a part of a character are left out too (tokenizers differ in how they write these), and one space
    at the beginning may differ.

    Raises:
        DataError: the texts differ.

    >>> from tl_codebook.experiments.tokfsm import TokFSM, make_tokenizer
    >>> tokenizer = make_tokenizer(TokFSM.paper())
    >>> check_text(vocabulary_of(tokenizer), tokenizer, np.array([0, 4, 1, 3]))
    """
    kept = _whole_characters(vocabulary, np.asarray(tokens)[~np.isin(tokens, tokenizer.all_special_ids)])
    ours = vocabulary.text(kept).text
    theirs = str(tokenizer.decode(kept.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if theirs in (ours, ours.removeprefix(" ")):
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((index for index, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    raise DataError(
        f"the bytes of the tokens make {ours[at : at + 40]!r} at character {at}, where {type(tokenizer).__name__} decodes "
        f"{theirs[at : at + 40]!r}. Positions in the text would be wrong. Give the tokenizer that wrote these tokens, or search for token "
        "ids."
    )


def _whole_characters(vocabulary: Vocabulary, tokens: np.ndarray) -> np.ndarray:
    data, ends = vocabulary.join(tokens)
    complete = codecs.utf_8_decode(data, "replace", False)[1]  # without what may go on
    inside = np.frombuffer(data + b" ", np.uint8) & 0xC0 == 0x80
    begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    first = np.flatnonzero(~inside[begins])
    last = np.flatnonzero(~inside[ends] & (ends <= complete))
    return tokens[first[0] : last[-1] + 1] if len(first) and len(last) else tokens[:0]


def save_vocabulary(folder: str | Path, vocabulary: Vocabulary) -> None:
    """Write the bytes of a vocabulary into a folder, two files, each replaced in one step.

    >>> save_vocabulary(tmp_path, Vocabulary.of_pieces([b"New", b" York"]))
    >>> load_vocabulary(tmp_path).bytes_of(1)
    b' York'
    """
    for name, array in ((_BYTES, vocabulary.data), (_OFFSETS, vocabulary.offsets)):
        target = Path(folder) / name
        temporary = target.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise CheckpointError(
                f"{target} could not be written ({error.strerror or error}). Free space or choose another folder."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def load_vocabulary(folder: str | Path) -> Vocabulary | None:
    """Read the vocabulary of a folder; None where there is none.

    Raises:
        CheckpointError: files that are damaged, hold something else, or lie elsewhere.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in (_BYTES, _OFFSETS)):
        return None
    try:
        data, offsets = (open_array(files.resolve(folder, name), of, (None,)) for name, of in ((_BYTES, np.uint8), (_OFFSETS, np.int64)))
        return Vocabulary(data, offsets)
    except (CheckpointError, DataError) as error:
        raise CheckpointError(f"the vocabulary in {folder} cannot be read ({error}). Collect the store again, or copy it again.") from error
