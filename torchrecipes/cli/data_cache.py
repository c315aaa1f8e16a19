"""`tune-style data cache`: what streams have tokenized (`data.mode=streaming`), and the removal of it."""

import argparse
import time
from pathlib import Path

from torchrecipes.errors import UserError

DAY = 24 * 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data cache`."""
    parser.epilog = "examples: tune-style data cache info\n          tune-style data cache clear --older-than 30"
    parser.add_argument("action", choices=["info", "clear"], help="info: list what is there. clear: remove it")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="what info lists first in a line (default: everything)")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="only what no run has used for so many days")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="the data.cache_dir of the runs (default: theirs)")


def main(args: argparse.Namespace) -> None:
    """List the folders of the cache, or remove those that nobody uses.

    Raises:
        UserError: a key that is not there (code `no_such_key`).
    """
    from torchrecipes.config.suggest import did_you_mean
    from torchrecipes.data.corpus.cache import default_cache_dir, list_entries, remove_entry

    folder = Path(args.cache_dir) if args.cache_dir else default_cache_dir()
    entries = list_entries(folder)
    known = [entry.key for entry in entries]
    for key in args.keys:
        if key not in known:
            hint = did_you_mean(key, known, "The keys are") if known else "The cache is empty."
            raise UserError(f"there is no {key} in {folder}", key="KEY", hint=hint, code="no_such_key")
    now = time.time()
    chosen = [
        entry
        for entry in entries
        if (not args.keys or entry.key in args.keys) and now - entry.last_used >= DAY * (args.older_than or 0)
    ]
    if args.action == "info":
        print(f"{folder}: {sum(entry.num_bytes for entry in chosen) / 1e6:,.1f} MB")
        for entry in chosen:
            print(
                f"{entry.key}  {entry.num_bytes / 1e6:,.1f} MB, {entry.num_tokens:,} tokens, "
                f"{'complete' if entry.finished else 'not complete'}, {_when(entry, now)}, {entry.source}"
            )
        return
    freed = 0
    for entry in chosen:
        if remove_entry(folder / entry.key):
            freed += entry.num_bytes
            print(f"removed {entry.key} ({entry.num_bytes / 1e6:,.1f} MB, {entry.source})")
        else:
            print(f"kept {entry.key}: it is in use")
    print(f"{freed / 1e6:,.1f} MB freed")


def _when(entry, now: float) -> str:
    return "in use" if entry.in_use else f"last used {max(0, now - entry.last_used) / DAY:,.1f} days ago"
