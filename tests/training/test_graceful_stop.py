import io
import os
import signal
import sys
import threading

import pytest

from torchrecipes.training.graceful_stop import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_work_goes_on(number, capfd):
    with GracefulStop() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
    message = capfd.readouterr().err
    assert "finishing the step, then saving" in message
    assert ("Ctrl+C again" in message) == (number == signal.SIGINT)


def test_rank_0_speaks_for_all(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with GracefulStop() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM and capfd.readouterr().err == ""


def test_a_second_interrupt_stops_at_once():
    with GracefulStop(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # not a person who is impatient
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_middle_of_a_line_to_the_terminal_breaks_nothing(capfd):
    class Stream(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    with GracefulStop() as signals, io.TextIOWrapper(io.BufferedWriter(Stream()), write_through=True) as stream:
        before, sys.stderr = sys.stderr, stream
        try:
            print("step 1", file=sys.stderr, flush=True)
        finally:
            sys.stderr = before
        assert signals.received == signal.SIGTERM
    assert "finishing the step" in capfd.readouterr().err


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with GracefulStop():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_may_use_it():
    seen = []

    def work():
        with GracefulStop() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
