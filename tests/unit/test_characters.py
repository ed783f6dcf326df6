"""Characters that act or hide are told from those that a reader sees, by one rule."""

import sys
import unicodedata

import pytest

from tl_codebook.characters import escaped, hostile, visible, without_hostile, written
from tl_codebook.describe import CodeLabel
from tl_codebook.errors import LabelError
from tl_codebook.views.visible import shown

EVERY = [chr(number) for number in range(sys.maxunicode + 1)]
HOSTILE = {
    "control": "\0\x07\x08\x0b\x1b\x7f\x80\x9b",
    "ends of a line": "\n\r\x85\u2028\u2029",
    "direction": "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    "no width": "\u00ad\u200b\u200c\u200d\u2060\ufeff\u180e\U000e0041",
    "nothing to see": "\u034f\u115f\u1160\u2800\u3164\uffa0\U000e0100",
    "halves": "\ud800\udbff\udc00\udfff",
    "private, and none": "\ue000\U0010ffff",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_each_kind_is_hostile_wherever_text_is_shown_or_kept(kind):
    for character in HOSTILE[kind]:
        assert hostile(character)
        assert not visible(character)
        assert without_hostile(f"a{character}b") == f"a{written(character)}b" == escaped(f"a{character}b")
        assert character not in shown(f"a{character}b")
        with pytest.raises(LabelError, match="one line"):
            CodeLabel("L0.mlp_out:1", f"a{character}b")


def test_the_rule_is_the_same_for_every_character():
    for character in EVERY:
        category = unicodedata.category(character)
        if visible(character):
            assert character == " " or category[0] in "LMNPS"
            assert not hostile(character)
        else:
            assert hostile(character) == (category != "Zs")
        assert written(character).isascii()
        assert all(map(visible, written(character)))


def test_text_of_people_stays():
    for text in ("naïve 汉字 🎉 ☂️ e\u0301 עברית العربية ไทย", "x\u00a0y", "wide\u3000space", "C:\\dir"):
        assert without_hostile(text) == text
        assert CodeLabel("L0.mlp_out:1", text).text == text
    assert shown("naïve 汉字 עברית \\") == "naïve 汉字 עברית \\"
    assert escaped("naïve 汉字 עברית") == "naïve 汉字 עברית"
    assert escaped("a\u00a0\\") == r"a\xa0\\"  # what looks like the common space is written out, and escapes are told from text


def test_what_is_to_be_kept():
    assert without_hostile("a\tb\r\n\x1b", keep="\t\r\n") == "a\tb\r\n\\x1b"
    assert without_hostile("plain") == "plain"
    assert without_hostile("") == escaped("") == ""
