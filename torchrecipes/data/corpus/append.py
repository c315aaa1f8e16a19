"""Adds shards to a corpus: `append_to_corpus` tokenizes more text, `merge_parts` joins the parts of a job array.

1. The new shards are built as a corpus of their own in a folder inside, by `prepare_corpus`: an interrupted call
   continues there.
2. They are linked into `train` and `validation` under the next numbers, where no reader looks at them yet.
3. `pending.json` with the new content of both `corpus.json` files is written: from then on `open_corpus` reads it in
   place of them. This is the one moment at which the corpus changes.
4. Both `corpus.json` are replaced and `pending.json` is removed. The next call completes one that was killed here.

An addition's record in `corpus.json` says what was added, when, and what the corpus was before.
"""

import json
import os
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.build import HASHES, SETTINGS_FILE, is_bulk, num_threads, split_file
from torchrecipes.data.corpus.corpus import PENDING_FILE, Corpus, open_corpus, prepare_corpus
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, to_json, writing
from torchrecipes.data.corpus.shards import Statistics, shard_name
from torchrecipes.data.sources.records import Source
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError
from torchrecipes.file_lock import lock_folder

SPLITS = ("train", "validation")
PER_PART = ("source_position", "statistics", "skipped", "shards")  # keys of a part's account that are not the whole's


def append_to_corpus(
    folder: str | Path,
    source: Source,
    tokenizer: Tokenizer,
    tokenizer_threads: int | None = None,
    again: bool = False,
) -> dict[str, dict[str, Any]]:
    """Tokenizes a source and adds it to the corpora `folder/train` and `folder/validation`.

    Documents are held out as in the corpus: by a hash of their text, below the same fraction. Those held out are added
    to the validation corpus, whose older documents stay. Where validation text has a source of its own, or there is
    none, everything goes to training. Whoever reads the corpus during the call, or after it was killed, sees the old
    corpus or the new one.

    Args:
        folder: what `prepare_corpus` made.
        source: the documents to add.
        tokenizer: that of the corpus.
        tokenizer_threads: as for `prepare_corpus`.
        again: add text that the corpus holds already.

    Returns:
        The record of the addition by split: `time`, `name` and `source` (the fingerprint) of what was added,
        `first_shard`, `documents`, `tokens`, and `before`, the statistics of the corpus until then.

    Raises:
        UserError: no corpus that `prepare_corpus` made (code `no_corpus`), another tokenizer (`other_tokenizer`), text
            that the corpus holds already (`duplicate_addition`), domain names that are not read as those of the corpus
            (`other_split`), or what `prepare_corpus` raises.
    """
    folder = Path(folder)
    settings = _settings(folder)
    with writing(folder):
        lock = lock_folder(folder, wait=True)
    try:
        is_finished_here = _finish(folder)
        _remove_earlier_splits(folder)
        if is_finished_here:
            record = _additions(folder)[-1]
            if record["train"]["source"] == source.fingerprint:
                return record  # this very call, killed after the corpus had changed
        corpora = _corpora(folder, tokenizer)
        _refuse_duplicate(folder, settings, source, again)
        staging = folder / f"addition-{source.fingerprint[:16]}-{len(_additions(folder))}"
        fraction, split = settings["validation"].get("fraction", 0), None
        if fraction and is_bulk(source, tokenizer) != ("names_per_suffix" in settings["validation"]):
            raise _other_split(source)
        if fraction and is_bulk(source, tokenizer):
            split = _extend_split(folder, source, len(_additions(folder)), num_threads(tokenizer_threads))
            fraction = fraction if split.holds_out_added else 0
        elif fraction and not _holds_out_any(source, fraction):
            fraction = 0
        prepare_corpus(
            staging,
            source,
            tokenizer,
            fraction,
            tokenizer_threads=tokenizer_threads,
            shard_tokens=settings["shard_tokens"],
            split=split,
        )
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "name": source.name}
        record["source"] = source.fingerprint
        bases = {split: corpus.account for split, corpus in corpora.items()}
        accounts = {split: _join(folder, split, bases[split], [staging], record) for split in bases}
        _commit(folder, accounts, staging.name)
        _remove_earlier_splits(folder)
        return {name: account["additions"][-1] for name, account in accounts.items()}
    finally:
        for file in lock:
            file.close()


def merge_parts(folder: str | Path) -> list[Corpus]:
    """Joins the corpora that a job array built in `folder/parts` into `folder/train` and `folder/validation`.

    Part i of n is a corpus in `folder/parts/i-of-n` (`part_folder`) whose source is a `SourcePart`. The shards are
    taken over as they are, in the order of the parts; `prepare_corpus` with the source of all parts opens the result.

    Returns:
        The corpora.

    Raises:
        UserError: a part is missing or unfinished (code `missing_part`), or parts were made with different settings
            (`other_corpus`).
    """
    folder = Path(folder)
    with writing(folder):
        lock = lock_folder(folder, wait=True) if folder.is_dir() else []
    try:
        if not _finish(folder):
            parts = _find_parts(folder)
            every = [_settings(part) for part in parts]
            whole = [{**settings, "source": settings["source"].rpartition(":")[0]} for settings in every]
            for part, settings in zip(parts, whole, strict=True):
                if settings != whole[0]:
                    differ = ", ".join(key for key in settings if settings[key] != whole[0].get(key))
                    problem = f"{part} and {parts[0]} were made with different settings: {differ}"
                    hint = f"Delete {folder / 'parts'} and tokenize all parts with the same arguments."
                    raise UserError(problem, hint=hint, code="other_corpus")
            splits = [split for split in SPLITS if (parts[0] / split).is_dir()]
            accounts = {split: _join(folder, split, None, parts, None) for split in splits}
            for account in accounts.values():
                account["settings"] = whole[0]
            write_atomically(folder / SETTINGS_FILE, [to_json(whole[0])])
            _commit(folder, accounts, "parts")
    finally:
        for file in lock:
            file.close()
    return [open_corpus(folder / split) for split in SPLITS if (folder / split / CORPUS_FILE).exists()]


def part_folder(folder: str | Path, index: int, count: int) -> Path:
    """The folder of part `index` of `count` for `merge_parts`."""
    return Path(folder) / "parts" / f"{index:05d}-of-{count:05d}"


def _find_parts(folder: Path) -> list[Path]:
    found = sorted((folder / "parts").glob("*-of-*"))
    if not found:
        hint = "Tokenize each with --shard-index I --num-shards N first."
        raise UserError(f"there are no parts in {folder / 'parts'}", hint=hint, code="missing_part")
    count = int(found[0].name.rpartition("-")[2])
    parts = [part_folder(folder, index, count) for index in range(count)]
    if strays := [part.name for part in found if part not in parts]:
        problem = f"{folder / 'parts'} holds parts of several job arrays: {found[0].name} and {strays[0]}"
        raise UserError(problem, hint="Delete those that do not belong.", code="other_corpus")
    splits = [split for split in SPLITS if any((part / split).is_dir() for part in parts)]
    missing = [part for part in parts if not all((part / split / CORPUS_FILE).exists() for split in splits)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing)} of {count} parts are not complete: {', '.join(part.name for part in missing[:5])}{more}",
            hint="Run their jobs (again); they continue after their last complete shard.",
            code="missing_part",
        )
    return parts


def _settings(folder: Path) -> dict[str, Any]:
    """What a corpus was made from."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
        if not (folder / "train" / CORPUS_FILE).exists():
            raise FileNotFoundError
        return dict(settings)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and (folder.parent / SETTINGS_FILE).exists():
            hint = f"Give {folder.parent}: both splits change together."
        else:
            hint = "Give the corpus_dir of a run, or what tune-style data tokenize wrote, once it is complete."
        raise UserError(f"{folder} holds no complete corpus", hint=hint, code="no_corpus") from None


def _corpora(folder: Path, tokenizer: Tokenizer) -> dict[str, Corpus]:
    return {
        split: open_corpus(folder / split, tokenizer) for split in SPLITS if (folder / split / CORPUS_FILE).exists()
    }


def _additions(folder: Path) -> list[dict[str, Any]]:
    """The records of the additions, each by split."""
    accounts = {
        split: json.loads((folder / split / CORPUS_FILE).read_text("utf-8"))
        for split in SPLITS
        if (folder / split / CORPUS_FILE).exists()
    }
    number = len(accounts["train"].get("additions", []))
    return [{split: account["additions"][i] for split, account in accounts.items()} for i in range(number)]


def _refuse_duplicate(folder: Path, settings: dict[str, Any], source: Source, again: bool) -> None:
    if again:
        return
    earlier = [("when it was made", settings["source"])]
    earlier += [(record["train"]["time"], record["train"]["source"]) for record in _additions(folder)]
    for when, fingerprint in earlier:
        if fingerprint == source.fingerprint:
            raise UserError(
                f"{folder} holds the text of {source.name} already (added: {when})",
                hint="Add it a second time with --again.",
                code="duplicate_addition",
            )


def _holds_out_any(source: Source, fraction: float) -> bool:
    limit = int(fraction * HASHES)
    return any(xxhash.xxh3_64_intdigest(document.text.encode()) < limit for document in source)


def _extend_split(folder: Path, source: Any, additions: int, threads: int) -> Any:
    from torchrecipes.data.domains.name_split import load_split, split_names  # it needs this package

    earlier = load_split(folder / split_file(additions))
    if earlier is None:
        hint = "Restore the file, or build the corpus again."
        raise UserError(f"{folder} holds no {split_file(additions)}", hint=hint, code="corrupt_corpus")
    with writing(folder):
        return split_names(folder / split_file(additions + 1), source, earlier.limit, threads, earlier)


def _remove_earlier_splits(folder: Path) -> None:
    """Removes the splits of the names before the last addition, also those that a killed call left."""
    for number in range(len(_additions(folder))):
        (folder / split_file(number)).unlink(missing_ok=True)


def _other_split(source: Any) -> UserError:
    return UserError(
        f"{source.name} is not read as the corpus was: domain names in bulk are held out by public suffix, documents "
        "are not",
        hint="Read it with the source of the corpus: tune-style data append CORPUS --config CONFIG "
        "data.source.path=FILE.",
        code="other_split",
    )


def _join(
    folder: Path, split: str, base: dict[str, Any] | None, parts: list[Path], record: dict[str, Any] | None
) -> dict[str, Any]:
    """Links the shards of `parts` after those of `base` and returns the account of all of them."""
    shards = list(base["shards"]) if base else []
    total = Statistics(**base["statistics"]) if base else Statistics()
    skipped = list(base["skipped"]) if base else []
    account = dict(base) if base else {}
    added = Statistics()
    first = len(shards)
    with writing(folder):
        (folder / split).mkdir(exist_ok=True)
    for part in parts:
        if not (part / split / CORPUS_FILE).exists():  # it holds out no document
            continue
        here = json.loads((part / split / CORPUS_FILE).read_text("utf-8"))
        account = account or {key: value for key, value in here.items() if key not in PER_PART}
        for shard in here["shards"]:
            name = shard_name(len(shards))
            with writing(folder):
                _link(part / split / shard["file"], folder / split / name)
            shards.append({**shard, "file": name})
        added += Statistics(**here["statistics"])
        skipped += here["skipped"]
    if record is not None:
        what = {"first_shard": first, "documents": added.documents, "tokens": added.tokens}
        addition = {**record, **what, "before": asdict(total)}
        account["additions"] = [*account.get("additions", []), addition]
    return {**account, "statistics": asdict(total + added), "skipped": skipped, "shards": shards}


def _link(path: Path, target: Path) -> None:
    # No account names the target yet: if it is there, a call that was killed here left it.
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        with path.open("rb") as file:
            write_atomically(target, iter(lambda: file.read(1 << 24), b""))


def _commit(folder: Path, accounts: dict[str, dict[str, Any]], staging: str) -> None:
    for split in accounts:
        _sync(folder / split)
    with writing(folder):
        write_atomically(folder / PENDING_FILE, [to_json({**accounts, "staging": staging})])
    _finish(folder)


def _finish(folder: Path) -> bool:
    """Completes a change that was interrupted after its commit; returns whether there was one."""
    pending = folder / PENDING_FILE
    if not pending.exists():
        return False
    with writing(folder):
        content = json.loads(pending.read_text("utf-8"))
        shutil.rmtree(folder / content.pop("staging"), ignore_errors=True)
        for split, account in content.items():
            write_atomically(folder / split / CORPUS_FILE, [to_json(account)])
        pending.unlink()
    return True


def _sync(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
