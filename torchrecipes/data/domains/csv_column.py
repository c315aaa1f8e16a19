"""One column of the lines of a CSV file, many lines at a time."""

from typing import NamedTuple

import numpy as np

END, LAST_SPACE, LAST_ASCII = ord("\n"), ord(" "), 127


class PlainFields(NamedTuple):
    """The fields of a column in the lines that are plain.

    Attributes:
        data: the fields, each with `\\n`.
        stops: where each of them stops in `data`, its `\\n` included, `[P]` int64.
        is_plain: whether a line is, `[L]` bool.
        line_ends: where the lines end, `[L]` int64.
    """

    data: bytes
    stops: np.ndarray
    is_plain: np.ndarray
    line_ends: np.ndarray


def plain_fields(data: bytes, column: int, num_columns: int, delimiter: str) -> PlainFields:
    """Return a column of lines without quotes.

    A line is plain if it is ASCII and has the right number of fields, and the wanted one neither is empty nor starts
    with white space.

    Args:
        data: complete lines that end in `\\n`.
        column: index of the column.
        num_columns: fields of every line.
        delimiter: one ASCII character.
    """
    characters = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero((characters == ord(delimiter)) | (characters == END))  # of fields
    last = np.flatnonzero(characters[ends] == END)  # of each line
    line_ends = ends[last]
    is_plain = np.diff(last, prepend=-1) == num_columns
    if not data.isascii():
        is_plain[line_ends.searchsorted(np.flatnonzero(characters > LAST_ASCII))] = False
    wanted = last[is_plain] - (num_columns - 1 - column)
    starts = np.concatenate([[-1], ends])[wanted] + 1
    lengths = ends[wanted] + 1 - starts
    is_text = (lengths > 1) & (characters[starts] > LAST_SPACE)
    if not is_text.all():
        is_plain[np.flatnonzero(is_plain)[~is_text]] = False
        starts, lengths = starts[is_text], lengths[is_text]
    stops = np.cumsum(lengths)
    # Where a field starts and stops: the sum is 1 inside fields.
    steps = np.zeros(len(data) + 1, np.int8)
    steps[starts] += 1
    steps[starts + lengths] -= 1
    fields = characters.compress(np.cumsum(steps[:-1], dtype=np.int8).view(bool))
    fields[stops - 1] = END
    return PlainFields(fields.tobytes(), stops, is_plain, line_ends)
