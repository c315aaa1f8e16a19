"""Unicode normalization, and characters that nobody sees."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from torchrecipes.data.cleaning.removal import Removal

# Line breaks that Python, JSON and editors disagree about: vertical tab, form feed, file, group and record separators,
# NEL, line separator, paragraph separator.
_LINE_BREAKS = dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), "\n")
_REMOVED = (
    *(*range(0x00, 0x09), *range(0x0E, 0x1C), 0x1F, *range(0x7F, 0x85), *range(0x86, 0xA0)),  # C0, DEL and C1
    *(0x00AD, 0x200B, 0x2060, 0xFEFF),  # soft hyphen, zero-width space, word joiner, byte order mark
    *(*range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # bidirectional embeddings, overrides and isolates
    *(*range(0xFDD0, 0xFDF0), 0xFFFE, 0xFFFF),  # no characters; those above U+FFFF would make the search slow
)
_TABLE = _LINE_BREAKS | dict.fromkeys(_REMOVED)
_FIRSTS = [code for code in _TABLE if code - 1 not in _TABLE]
_LASTS = [code for code in _TABLE if code + 1 not in _TABLE]
# Of ranges: 15 times as fast as one of single characters.
_ANY = re.compile(
    "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(sorted(_FIRSTS), sorted(_LASTS), strict=True)).join("[]")
)


@dataclass(frozen=True)
class Normalize:
    """Brings a text to a Unicode normal form and removes control and zero-width characters.

    Removed: C0 and C1 controls but tab and line feed, DEL, the soft hyphen, zero-width space (U+200B), word joiner
    (U+2060), byte order mark (U+FEFF), bidirectional embeddings, overrides and isolates (U+202A to U+202E, U+2066 to
    U+2069), and U+FDD0 to U+FDEF, U+FFFE and U+FFFF, which are no characters. Vertical tab, form feed, NEL and the
    Unicode line and paragraph separators become line feeds. Kept: the joiners U+200C and U+200D, which Persian, Indic
    scripts and emoji need, the marks U+200E and U+200F, and every kind of blank.

    Args:
        form: the normal form (Unicode Standard Annex #15). NFC changes no visible character; NFKC also replaces
            ligatures, full-width letters, superscripts and no-break spaces, which changes formulas and code. None:
            keep.
        control_characters: remove control and zero-width characters.
    """

    form: Literal["NFC", "NFKC"] | None = "NFC"
    control_characters: bool = True

    def __call__(self, text: str) -> str | Removal:
        """Return the normalized text."""
        if self.control_characters and _ANY.search(text):
            text = text.translate(_TABLE)
        if self.form is not None and not text.isascii():
            text = unicodedata.normalize(self.form, text)
        return text if text and not text.isspace() else Removal("normalize.empty", "nothing visible")
