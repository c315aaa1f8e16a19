"""Finds the licence of a text, by plain rules: SPDX headers, front matter, LICENSE files, links to Creative Commons.

A licence is an SPDX identifier or expression, https://spdx.org/licenses, and None where no rule applies: nothing is
guessed.
"""

import re
from pathlib import Path

NAMES = re.compile(r"(?i)(un)?licen[cs]e([-_.].*)?|copying([-_.].*)?")
HEADER = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]+)")
HEADER_CHARACTERS = 4_000  # of a file: a header is at its top
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
ADDRESS = re.compile(r"(?i)creativecommons\.org/(?:licenses/(by(?:-nc)?(?:-nd|-sa)?)|publicdomain/(zero))/(\d\.\d)")
LONGEST = 200_000  # characters of a LICENSE file that are read

# A licence is in a file if all its phrases are, in lower case and with single blanks. The GPL's own text does not say
# whether later versions may be used, so the identifier without that word is given, as GitHub does.
PHRASES = [
    ("AGPL-3.0", ["gnu affero general public license version 3"]),
    ("LGPL-3.0", ["gnu lesser general public license version 3"]),
    ("LGPL-2.1", ["gnu lesser general public license version 2.1"]),
    ("LGPL-2.0", ["gnu library general public license version 2"]),
    ("GFDL-1.3", ["gnu free documentation license version 1.3"]),
    ("GPL-3.0", ["gnu general public license version 3"]),
    ("GPL-2.0", ["gnu general public license version 2"]),
    ("Apache-2.0", ["apache license version 2.0"]),
    ("MPL-2.0", ["mozilla public license version 2.0"]),
    ("MPL-1.1", ["mozilla public license version 1.1"]),
    ("EPL-2.0", ["eclipse public license - v 2.0"]),
    ("CC-BY-NC-SA-4.0", ["attribution-noncommercial-sharealike 4.0 international"]),
    ("CC-BY-NC-ND-4.0", ["attribution-noncommercial-noderivatives 4.0 international"]),
    ("CC-BY-NC-4.0", ["attribution-noncommercial 4.0 international"]),
    ("CC-BY-ND-4.0", ["attribution-noderivatives 4.0 international"]),
    ("CC-BY-SA-4.0", ["attribution-sharealike 4.0 international"]),
    ("CC-BY-SA-3.0", ["attribution-sharealike 3.0"]),
    ("CC-BY-4.0", ["attribution 4.0 international"]),
    ("CC0-1.0", ["cc0 1.0 universal"]),
    ("Python-2.0", ["python software foundation license version 2"]),
    ("BSL-1.0", ["boost software license - version 1.0"]),
    ("Unlicense", ["this is free and unencumbered software released into the public domain"]),
    ("MIT", ["permission is hereby granted, free of charge", "the above copyright notice and this permission notice"]),
    ("MIT-0", ["permission is hereby granted, free of charge", 'is provided "as is"']),
    ("ISC", ["permission to use, copy, modify, and/or distribute this software", "and this permission notice appear"]),
    ("0BSD", ["permission to use, copy, modify, and/or distribute this software"]),
    ("BSD-4-Clause", ["redistribution and use in source and binary forms", "all advertising materials"]),
    ("BSD-3-Clause", ["redistribution and use in source and binary forms", "may be used to endorse or promote"]),
    ("BSD-2-Clause", ["redistribution and use in source and binary forms"]),
    ("Zlib", ["altered source versions must be plainly marked as such"]),
]
KNOWN = {identifier.lower(): identifier for identifier, _ in PHRASES}


def license_of_text(text: str) -> str | None:
    """Returns the licence whose text this is, the content of a LICENSE file; of several in one file, the first."""
    if found := license_of_header(text):
        return found
    words = " ".join(text[:LONGEST].lower().replace("“", '"').replace("”", '"').replace(",", ", ").split())
    words = words.replace("license, version", "license version")
    places = [
        (words.index(phrases[0]), order, name)
        for order, (name, phrases) in enumerate(PHRASES)
        if all(phrase in words for phrase in phrases)
    ]
    return min(places)[2] if places else None


def license_of_header(text: str) -> str | None:
    """Returns the expression after `SPDX-License-Identifier:` near the top of a file."""
    found = HEADER.search(text, 0, HEADER_CHARACTERS)
    return " ".join(found[1].rstrip(" -").split()) or None if found else None


def license_of_address(address: str) -> str | None:
    """Returns the licence of a Creative Commons address."""
    found = ADDRESS.search(address)
    if not found:
        return None
    return f"CC0-{found[3]}" if found[2] else f"CC-{found[1].upper()}-{found[3]}"


def license_of_field(value: str) -> str | None:
    """Returns the licence that a `license:` field of front matter names: an identifier, or an address."""
    value = value.strip().strip("\"'")
    if IDENTIFIER.fullmatch(value):
        return KNOWN.get(value.lower(), value)
    return license_of_address(value)


class FolderLicenses:
    """The licence of every folder of a tree: of the LICENSE or COPYING file in it, or else of the folder above it.

    Args:
        root: the top of the tree. Files above it are not read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.found: dict[Path, tuple[str | None, str | None]] = {}

    def of(self, folder: Path) -> tuple[str | None, str | None]:
        """Returns the licence of the files in a folder, and the file that says so; a file without an answer counts."""
        if folder not in self.found:
            own = self._own(folder)
            above = folder != self.root and self.root in folder.parents
            self.found[folder] = own if own[1] or not above else self.of(folder.parent)
        return self.found[folder]

    def _own(self, folder: Path) -> tuple[str | None, str | None]:
        try:
            paths = sorted(path for path in folder.iterdir() if NAMES.fullmatch(path.name) and path.is_file())
        except OSError:
            return None, None
        found = []
        for path in paths:
            try:
                with path.open(encoding="utf-8", errors="replace") as file:
                    found.append((license_of_text(file.read(LONGEST)), path.name))
            except OSError:
                continue
        # Several files (LICENSE-APACHE beside LICENSE-MIT) are a choice in practice, but none of them says so.
        named = sorted({name for name, _ in found if name})
        if len(named) > 1:
            return " OR ".join(named), ", ".join(path for _, path in found)
        return (named[0] if named else None), (", ".join(path for _, path in found) or None)
