"""The bytes of tokens, and the tokens of a text: every position exact, whatever the characters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import make_tokenizer
from tests.unit.search_store import MemoryStore
from tl_codebook.errors import CheckpointError, DataError
from tl_codebook.store.concepts import match_text
from tl_codebook.store.text import Vocabulary, check_text, decode, load_vocabulary, save_vocabulary, vocabulary_of

ODD = [
    "naïve café — “quotes”",
    "🦊 and 👩‍👩‍👧 and 🇫🇷",
    "e\u0301 combining",
    "nul \0 here",
    "\u202eright to left",
    "a\r\nb\u2028c\u2029d\x85e",
    "</script><img onerror=x>\x1b[31m",
    "中文字符",
]
BYTES = Vocabulary.of_pieces([bytes([value]) for value in range(256)])


def fast(core, **options):
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **options)


def byte_level(*added, merges=()):
    """Make a byte-level tokenizer with a token for each byte, some merges, and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(text, normalized=False) for text in added])
    return fast(core)


def sentencepiece():
    """Make a tokenizer as Llama's: a mark for the space, and bytes for what is no token."""
    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "▁the", "a", "b", "t", "▁a"]
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    return fast(core, unk_token="<unk>"), pieces


def ids_of(tokenizer, text):
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", ODD)
def test_byte_level_tokens_make_the_text_of_the_tokenizer(text):
    tokenizer = byte_level()
    tokens = ids_of(tokenizer, text)
    assert len(tokens) == len(text.encode())
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.text(tokens).text == text == tokenizer.decode(tokens)
    for start in range(len(tokens)):  # cut anywhere, inside characters too
        check_text(vocabulary, tokenizer, tokens[start : start + 9])


def test_a_token_that_holds_parts_of_two_characters():
    """The last byte of é and the first of ï are one token: both characters lie in it, and it in both."""
    tokenizer = byte_level(merges=[("©", "Ã")])  # the bytes A9 and C3, as byte-level tokenizers write them
    tokens = ids_of(tokenizer, "éï!")
    vocabulary = vocabulary_of(tokenizer)
    assert [vocabulary.bytes_of(token) for token in tokens.tolist()] == [b"\xc3", b"\xa9\xc3", b"\xaf", b"!"]
    store = MemoryStore([tokens.tolist()], {}, 1, vocabulary)
    assert spans(match_text(store, "é")) == [(0, 1)]
    assert spans(match_text(store, "ï")) == [(1, 2)]
    assert spans(match_text(store, "!")) == [(3, 3)]


def spans(matches):
    return list(zip(matches.first.tolist(), matches.last.tolist(), strict=True))


def test_added_tokens_are_the_text_that_they_are_written_as():
    """GPT-NeoX adds runs of spaces, which the byte table does not have; of é it would make a byte."""
    tokenizer = byte_level("    ", "é", "<|end|>")
    tokens = ids_of(tokenizer, "x    é<|end|>")
    assert vocabulary_of(tokenizer).text(tokens).text == "x    é<|end|>"
    assert len(tokens) == 4


def test_sentencepiece_tokens():
    tokenizer, pieces = sentencepiece()
    vocabulary = vocabulary_of(tokenizer)
    tokens = [pieces.index(piece) for piece in ("▁the", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "▁a", "b", "▁", "<0x0A>")]
    assert vocabulary.text(np.array(tokens)).text == " the🦊 ab \n"
    check_text(vocabulary, tokenizer, np.array(tokens))
    store = MemoryStore([tokens], {}, 1, vocabulary)
    assert spans(match_text(store, "🦊")) == [(1, 4)]
    assert match_text(store, "ab").first.tolist() == [5]


def test_wordpiece_and_word_level_tokens():
    words = {"[UNK]": 0, "play": 1, "##ing": 2, "the": 3, ",": 4, "caf": 5, "##é": 6}
    core = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = fast(core, unk_token="[UNK]")
    tokens = ids_of(tokenizer, "the playing, café the")
    assert vocabulary_of(tokenizer).text(tokens).text == " the playing, café the"
    check_text(vocabulary_of(tokenizer), tokenizer, tokens)
    plain = make_tokenizer()
    assert vocabulary_of(plain).text(np.array([3, 14, 5])).text == " w3 w14 w5"
    check_text(vocabulary_of(plain), plain, np.array([3, 14, 5]))


def test_real_tokenizers(shared):
    from transformers import AutoTokenizer, GPT2Tokenizer

    gpt2 = GPT2Tokenizer(str(shared("data/gpt2-vocab.json")), str(shared("data/gpt2-merges.txt")))
    for tokenizer in (gpt2, AutoTokenizer.from_pretrained(shared("models/stories260K"))):
        vocabulary = vocabulary_of(tokenizer)
        for text in ODD:
            tokens = ids_of(tokenizer, text)
            assert vocabulary.text(tokens).text.removeprefix(" ") == text
            check_text(vocabulary, tokenizer, tokens)


def test_another_tokenizer_than_the_one_of_the_tokens():
    vocabulary = Vocabulary.of_pieces([b"x"] * 256)
    with pytest.raises(DataError, match=r"the bytes of the tokens make 'xx' at character 0, where .* decodes 'no'"):
        check_text(vocabulary, byte_level(), ids_of(byte_level(), "no"))


def test_more_tokens_than_the_tokenizer_has():
    vocabulary = vocabulary_of(make_tokenizer(), n_tokens=70)
    assert (vocabulary.n_tokens, vocabulary.bytes_of(69), vocabulary.text(np.array([3, 69, 4])).text) == (70, b"", " w3 w4")
    with pytest.raises(DataError, match="token 70 is asked for, but the vocabulary has 70"):
        vocabulary.join(np.array([3, 70]))
    with pytest.raises(DataError, match="token -1"):
        vocabulary.join(np.array([-1]))


@given(st.binary(max_size=40))
def test_decoding_any_bytes(data):
    text, starts = decode(data)
    assert text == data.decode(errors="replace")
    if starts is None:
        starts = np.arange(len(data) + 1)
    assert (len(starts), starts[-1]) == (len(text) + 1, len(data))
    for character, start, stop in zip(text, starts, starts[1:], strict=False):
        assert data[start:stop].decode(errors="replace") == character or character == "\ufffd"


@given(st.text(st.sampled_from("aé中🦊\0\n "), max_size=30), st.integers(0, 20), st.sampled_from("aé中🦊\0"))
def test_positions_of_characters(text, cut, wanted):
    """With a token for each byte, a character's tokens are its bytes, also after a beginning that was cut inside a character."""
    data = text.encode()[cut:]
    store = MemoryStore([list(data)], {}, 1, BYTES)
    width = len(wanted.encode())
    found = [place for place in range(len(data)) if data[place : place + width] == wanted.encode()]
    matches = match_text(store, f"({wanted})")
    assert spans(matches) == [(place, place + width - 1) for place in found]
    assert matches.positions("all").tolist() == [place + byte for place in found for byte in range(width)]


def test_a_text_on_one_line_of_a_megabyte():
    data = ("é" * 500_000 + "end").encode()
    matches = match_text(MemoryStore([list(data)], {}, 1, BYTES), "(e)nd")
    assert (matches.first.tolist(), matches.start.tolist()) == ([1_000_000], [500_000])


def test_a_vocabulary_is_written_and_read(tmp_path):
    assert load_vocabulary(tmp_path) is None
    save_vocabulary(tmp_path, BYTES)
    save_vocabulary(tmp_path, Vocabulary.of_pieces([b"", "é".encode(), b"\xf0"]))
    read = load_vocabulary(tmp_path)
    assert [read.bytes_of(token) for token in range(3)] == [b"", b"\xc3\xa9", b"\xf0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocabulary.bytes.npy", "vocabulary.offsets.npy"]


@pytest.mark.parametrize("damage", ["missing", "short", "pickled", "wrong", "swapped"])
def test_a_damaged_vocabulary(tmp_path, damage):
    save_vocabulary(tmp_path, BYTES)
    first, second = tmp_path / "vocabulary.bytes.npy", tmp_path / "vocabulary.offsets.npy"
    if damage == "missing":
        first.unlink()
    elif damage == "short":
        second.write_bytes(second.read_bytes()[:100])
    elif damage == "pickled":
        np.save(first, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage == "wrong":
        np.save(second, np.array([0, 9], np.int64))
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_vocabulary(tmp_path)


def test_the_tokens_of_a_text():
    words = Vocabulary.of_pieces([b"York", b" York", b"York", b""])
    assert (words.ids_of("York"), words.ids_of(" York"), words.ids_of("york"), words.ids_of("")) == ([0, 2], [1], [], [])
    with pytest.raises(DataError, match="2 offsets were given with 3 bytes"):
        Vocabulary(np.zeros(3, np.uint8), np.array([0, 2]))
