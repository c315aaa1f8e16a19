"""`Removal`: why a step removes a document."""

from typing import NamedTuple


class Removal(NamedTuple):
    """A document is removed.

    Attributes:
        rule: the step and its rule, such as `gopher_quality.max_words`: removed documents are counted by it.
        detail: what this document has, such as `120,000 words`.
    """

    rule: str
    detail: str = ""
