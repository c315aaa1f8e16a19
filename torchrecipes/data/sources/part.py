"""`SourcePart`: one of several equal parts of a source, for a job of an array."""

import copy
from collections.abc import Iterator
from itertools import accumulate, islice

from torchrecipes.data.sources.records import Document, ReadStats, Source
from torchrecipes.data.sources.text_files import files
from torchrecipes.errors import UserError


class SourcePart:
    """Part `index` of `count` of a source; the parts together hold every document once.

    Of `files` with as many files or more, a part is consecutive files of about the same number of bytes, so that the
    parts, one after the other, have the order of the source. Of any other source it is every `count`-th document, and
    each part reads the whole source.

    Args:
        source: the whole source.
        index: from 0 to `count - 1`.
        count: number of parts.

    Attributes:
        by_file: whether a part reads its own files only.

    Raises:
        UserError: the index is out of range (code `out_of_range`), or the source gives domain names, whose split needs
            all of them (`names_in_parts`).
    """

    def __init__(self, source: Source, index: int, count: int):
        if not 0 <= index < count:
            hint = f"Parts are numbered from 0 to {count - 1}." if count > 0 else "There must be 1 part or more."
            raise UserError(f"there is no part {index} of {count}", hint=hint, code="out_of_range")
        if hasattr(source, "blocks"):
            raise UserError(
                "domain names are not prepared in parts: which are held out depends on all of them",
                hint="Prepare them in one job, at millions of names a second and core.",
                code="names_in_parts",
            )
        self.index, self.count = index, count
        self.fingerprint = f"{source.fingerprint}:{index}/{count}"
        self.by_file = isinstance(source, files) and len(source.found) >= count
        self._source = _some_files(source, index, count) if self.by_file else source

    @property
    def name(self) -> str:
        """The source's name, and which part it is."""
        return f"{self._source.name} (part {self.index} of {self.count})"

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return self._source.num_bytes

    @property
    def report(self) -> ReadStats:
        """The counts of this part; what the whole source skips is counted in part 0."""
        report = self._source.report
        if self.by_file or self.index == 0:
            return report
        return ReadStats(report.documents, report.characters)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents of this part."""
        return iter(self._source) if self.by_file else islice(self._source, self.index, None, self.count)


def _some_files(source: files, index: int, count: int) -> files:
    """The files whose middle byte is in this part of all bytes; each part gets one at least."""
    total = max(1, source.num_bytes)
    ends = list(accumulate(file.size for file in source.found))
    wanted = [(2 * end - file.size) * count // (2 * total) for file, end in zip(source.found, ends, strict=True)]
    parts: list[int] = []  # of each file; it goes up by 0 or 1, and no part stays empty
    for i, part in enumerate(wanted):
        last = parts[-1] if parts else -1
        parts.append(max(min(part, last + 1, count - 1), last, 0, count - len(wanted) + i))
    chosen = copy.copy(source)
    chosen.__dict__.pop("_content", None)  # the cached checksums of all files
    chosen.found = [file for file, part in zip(source.found, parts, strict=True) if part == index]
    chosen.skipped = source.skipped if index == 0 else []
    return chosen
