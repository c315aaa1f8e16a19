"""Tokenizes a source in a process of its own, beside the training.

1. The process ends with the one that started it, whichever way that ends: it looks at its parent.
2. If it is killed, a thread of the parent starts it again. It continues after its last complete shard.
3. If it fails, the reason is in the folder, where everyone who waits for a shard finds it.
4. It pauses when it is far ahead of what anyone has asked for.
"""

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.build import build_corpus
from torchrecipes.data.sources.records import Source
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

FAILED_FILE, LOG_FILE, WANTED_FILE = "failed.json", "tokenizer.log", "wanted"
RESTARTS = 5  # of a process that is killed again and again before it has written a shard
PRIORITY = 10  # lower than the training's, which may need the same cores
CHECK_EVERY = 0.2  # seconds
START = f"import sys; from {__name__} import main; sys.exit(main())"


class TokenizerProcess:
    """Starts the process, and starts it again when it was killed.

    Args:
        folder: the folder of the cache.
        source, tokenizer, settings, threads: see `build_corpus`.

    Raises:
        UserError: the source cannot be pickled (code `not_picklable`).
    """

    def __init__(
        self, folder: Path, source: Source, tokenizer: Tokenizer, settings: dict[str, Any], threads: int | None
    ):
        self.folder = folder
        try:
            self._job = pickle.dumps((source, tokenizer, settings, threads))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise _not_picklable(source, str(error)) from error
        if type(source).__module__ == "__main__":
            raise _not_picklable(source, "its class is in the script that was started")
        self._process: subprocess.Popen | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The number of the process that runs now, or ran last."""
        return self._process and self._process.pid

    def start(self) -> None:
        """Starts the process and the thread that watches it."""
        self._launch()
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the process; what it has written is kept."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        atexit.unregister(self.stop)

    def _launch(self) -> None:
        # Not a fork: this process has threads and, perhaps, a GPU. In a session of its own, since Ctrl+C is for the
        # training, which finishes its step first.
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with (self.folder / LOG_FILE).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(os.getpid()), self.folder],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def _watch(self) -> None:
        restarts, before = 0, self._progress()
        while True:
            self._process.communicate(self._job)
            code = self._process.returncode
            if self._stopped or code == 0:
                return
            if code > 0:
                if not (self.folder / FAILED_FILE).exists():  # it did not come far enough to say why
                    _write_failure(self.folder, {"bug": f"exit code {code}, see {self.folder / LOG_FILE}"})
                return
            restarts = restarts + 1 if self._progress() == before else 1
            before = self._progress()
            if restarts > RESTARTS:
                _write_failure(
                    self.folder,
                    UserError(
                        f"the process that tokenizes was killed {restarts} times in a row (signal {-code})",
                        hint=f"Did it run out of memory? Its log is {self.folder / LOG_FILE}.",
                        code="tokenizer_killed",
                    ).to_dict(),
                )
                return
            print(f"the process that tokenizes was killed (signal {-code}): starting it again", flush=True)
            self._launch()

    def _progress(self) -> int:
        return sum(1 for _ in self.folder.glob("*/shard-*.safetensors"))


def _not_picklable(source: Source, why: str) -> UserError:
    return UserError(
        f"{type(source).__name__} cannot be sent to the process that tokenizes: {why}",
        key="data.source",
        hint="Define it in a module, without open files in it, or set data.mode=prepare.",
        code="not_picklable",
    )


def _write_failure(folder: Path, failure: dict[str, Any]) -> None:
    write_atomically(folder / FAILED_FILE, [json.dumps(failure).encode()])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_EVERY)
    os._exit(1)


def _pause(folder: Path, shards: int) -> None:
    """Waits while there are as many shards as anyone has asked for."""
    while True:
        try:
            wanted = int((folder / WANTED_FILE).read_text())
        except (FileNotFoundError, ValueError):
            return
        if shards < wanted:
            return
        time.sleep(CHECK_EVERY)


def main() -> int:
    """Does the job that is pickled on stdin, and returns the exit code.

    Arguments of the command line: the number of the parent process, and the folder.
    """
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(PRIORITY)
    folder = Path(sys.argv[2])
    try:
        source, tokenizer, settings, threads = pickle.load(sys.stdin.buffer)
        build_corpus(folder, source, tokenizer, settings, None, threads, throttle=lambda shards: _pause(folder, shards))
    except UserError as error:
        _write_failure(folder, error.to_dict())
        return 2
    except Exception:
        _write_failure(folder, {"bug": traceback.format_exc()})
        return 1
    return 0
