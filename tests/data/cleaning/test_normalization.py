"""`Normalize`: normal forms, and which invisible characters go."""

import unicodedata

import pytest

from torchrecipes.data.cleaning import Normalize, Removal


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("e\u0301", "é"),
        ("ﬁne\u00a0x²", "ﬁne\u00a0x²"),
        ("a\x00b\x1bc\x7fd\x9fe", "abcde"),
        ("zero\u200bwidth\ufeff\u2060\u00adend", "zerowidthend"),
        ("right\u202eleft\u2066x\u2069", "rightleftx"),
        (
            "\U0001f468\u200d\U0001f469\u200d\U0001f466 می\u200cخواهم",
            "\U0001f468\u200d\U0001f469\u200d\U0001f466 می\u200cخواهم",
        ),
        ("a\x0bb\x0cc\x85d\u2028e\u2029f", "a\nb\nc\nd\ne\nf"),
        ("\ttab\nline", "\ttab\nline"),
        ("no\uffffcharacter\ufdd0\ufffe", "nocharacter"),
        ("e\u200b\u0301", "é"),  # removed first: what is left composes
    ],
)
def test_nfc(text, wanted):
    assert Normalize()(text) == wanted
    assert Normalize()(wanted) == wanted


def test_nfkc_and_no_form():
    assert Normalize(form="NFKC")("ﬁne\u00a0x² ｆｕｌｌ") == "fine x2 full"
    assert Normalize(form=None)("e\u0301\u200b") == "e\u0301"
    assert Normalize(form=None, control_characters=False)("a\x00") == "a\x00"


def test_every_character_is_stable_and_nothing_visible_goes():
    step = Normalize()
    text = "".join(f" {chr(code)}" for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    once = step(text)
    assert step(once) == once
    gone = {c for c in set(text) - set(once) if unicodedata.normalize("NFC", c) == c}
    assert {unicodedata.category(c) for c in gone} <= {"Cc", "Cf", "Cn", "Zl", "Zp"}


def test_nothing_visible_is_removed():
    assert Normalize()("\u200b\x00 \n") == Removal("normalize.empty", "nothing visible")
