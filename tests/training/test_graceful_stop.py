import io
import os
import signal
import sys
import threading

import pytest

from torchrecipes.training.graceful_stop import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_training_continues(number, capfd):
    with GracefulStop() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    message = capfd.readouterr().err
    assert signal.Signals(number).name in message
    assert ("Ctrl+C" in message) == (number == signal.SIGINT)


def test_only_rank_0_prints(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM and capfd.readouterr().err == ""


def test_a_second_interrupt_stops_at_once():
    with GracefulStop(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat it
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_middle_of_a_line_to_the_terminal_breaks_nothing(capfd):
    class Stream(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    with GracefulStop() as stop, io.TextIOWrapper(io.BufferedWriter(Stream()), write_through=True) as stream:
        before, sys.stderr = sys.stderr, stream
        try:
            print("step 1", file=sys.stderr, flush=True)
        finally:
            sys.stderr = before
        assert stop.received == signal.SIGTERM
    assert "SIGTERM" in capfd.readouterr().err


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with GracefulStop():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ranks_agree_on_the_signal():
    with GracefulStop() as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM


def test_another_thread_may_use_it():
    seen = []

    def work():
        with GracefulStop() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
