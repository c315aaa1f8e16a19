"""Ends a run after its step, with a checkpoint, on Ctrl+C and SIGTERM."""

import contextlib
import os
import signal
import threading
from types import FrameType

from torchrecipes.distributed import collectives


class GracefulStop:
    """While the context is open, SIGINT and SIGTERM only set `received`, which the loop checks after every step.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python delivers no signals, the
    context does nothing.

    Attributes:
        received: the number of the first signal, or None. A shell expects the exit code 128 + number.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def agreed(self) -> int:
        """The signal that any rank has received, 0 for none; the same on all ranks, which call it together."""
        return collectives.all_reduce_max(self.received or 0)

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if os.environ.get("RANK", "0") != "0":
            return
        again = "; press Ctrl+C again to stop at once" if number == signal.SIGINT else ""
        message = f"\n{signal.Signals(number).name}: finishing the step, then saving{again}\n"
        # Not print: the signal may have come in the middle of one, and a stream refuses to be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
