"""Progress of a long pass over data: a tqdm bar on a terminal, a line every 15 seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

BAR_EVERY, LINE_EVERY = 0.1, 15.0  # seconds between two updates of the bar, or two lines where there is no terminal


class Progress:
    """Counts documents, megabytes and tokens, and shows speeds and, with a known size, the time that is left.

    Args:
        what: what is being done, the first words of every line.
        total_bytes: total bytes of text, where known.
        unit: what `documents` are called.
    """

    def __init__(self, what: str, total_bytes: int | None = None, unit: str = "documents"):
        self.what, self.total_bytes, self.unit = what, total_bytes, unit
        self.documents = self.bytes = self.tokens = 0
        self.skipped_bytes = 0  # already done by an earlier call: not part of the speed
        self.start = self.shown = time.monotonic()
        terminal = sys.stderr.isatty()
        layout = "{desc} {percentage:3.0f}%|{bar}|{postfix}" if total_bytes else "{desc}{postfix}"
        self.bar = tqdm(desc=what, total=total_bytes, bar_format=layout, file=sys.stderr) if terminal else None

    def add(self, documents: int, num_bytes: int, tokens: int = 0, skipped_bytes: int = 0) -> None:
        """Adds what was done since the last call."""
        self.documents += documents
        self.bytes += num_bytes
        self.tokens += tokens
        self.skipped_bytes += skipped_bytes
        now = time.monotonic()
        if now - self.shown >= (LINE_EVERY if self.bar is None else BAR_EVERY):
            self.shown = now
            self._show()

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self._show()
            self.bar.close()

    def _show(self) -> None:
        if self.bar is None:
            print(f"{self.what}: {self._numbers()}", file=sys.stderr, flush=True)
        else:
            done = self.bytes + self.skipped_bytes  # may exceed the total, which is of the files, compressed or not
            self.bar.n = min(done, self.total_bytes) if self.total_bytes else done
            self.bar.set_postfix_str(self._numbers())

    def _numbers(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        parts = [f"{self.documents:,} {self.unit}"]
        if self.tokens:
            parts.append(f"{_count(self.tokens)} tokens, {_count(self.tokens / seconds)} tokens/s")
        parts.append(f"{self.bytes / seconds / 1e6:.1f} MB/s")
        done = self.bytes + self.skipped_bytes
        if self.total_bytes and self.bytes and done < self.total_bytes:
            left = int((self.total_bytes - done) / self.bytes * seconds)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Prints `what` now and with the time passed every 15 seconds: for calls into a library that show nothing."""
    done, start = threading.Event(), time.monotonic()

    def show() -> None:
        while not done.wait(LINE_EVERY):
            print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    print(f"{what} ...", file=sys.stderr, flush=True)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _count(number: float) -> str:
    # Tokenizing makes millions per second, a model on a CPU scores some thousands.
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number / 1e3:,.1f} k"
