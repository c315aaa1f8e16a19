"""Corpora of domain names: what is in them, which names are held out, and the same files however they were made."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from torchrecipes import atomic_write
from torchrecipes.cli.main import main
from torchrecipes.data.corpus import append_to_corpus, open_corpus, prepare_corpus
from torchrecipes.data.corpus.build import build_corpus, corpus_settings
from torchrecipes.data.domains import domain_names, domain_tokenizer, name_hashes
from torchrecipes.data.domains.name_split import first_split
from torchrecipes.data.domains.suffix_counts import count_suffixes
from torchrecipes.data.sources import Mixture, SourcePart, files
from torchrecipes.data.sources.beginning import beginning_of
from torchrecipes.errors import UserError

publicsuffixlist = pytest.importorskip("publicsuffixlist")
PSL = publicsuffixlist.PublicSuffixList()
FRACTION = 0.004


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh0123xyz", k=draw.randrange(3, 12))) + "-" * (i % 2) for i in range(count)]


def write_names(folder: Path, seed: int = 0, scale: int = 1) -> list[str]:
    """Six files of names; gives the names in their order."""
    suffixes = ["com"] * 300 + ["de"] * 110 + ["co.uk"] * 100 + ["com.br"] * 99 + ["blogspot.com"] * 20 + ["tld7"] * 5
    suffixes = suffixes[::scale]
    names = [f"{word}{i}.{suffix}" for i, (word, suffix) in enumerate(zip(words(seed, 999), suffixes, strict=False))]
    random.Random(seed).shuffle(names)
    names[7:7] = [names[3], names[4]]  # some come twice
    folder.mkdir()
    for i in range(6):
        lines = names[i::6]
        (folder / f"names-{i}.txt").write_text("\n".join(["# names", lines[0].upper(), *lines[1:], "a_b.com", ""]))
    (folder / "names-3.txt.gz").write_bytes(b"\x1f\x8b broken")  # read after names-3.txt, and skipped
    return [name for i in range(6) for name in names[i::6]]


def held_out(names: list[str], limit: int) -> set[str]:
    """The rule, name by name."""
    of_suffix: dict[str, list[int]] = {}
    hashes = {name: int(hash_of(name)) for name in names}
    for name in names:
        of_suffix.setdefault(PSL.publicsuffix(name), []).append(hashes[name])
    chosen = {
        min(values) for values in of_suffix.values() if len(values) >= 100 and not any(one < limit for one in values)
    }
    return {name for name in names if hashes[name] < limit or hashes[name] in chosen}


def hash_of(name: str) -> np.uint64:
    return name_hashes(np.frombuffer(name.encode(), np.uint8), np.array([len(name)]))[0]


def names_of(corpus, tokenizer) -> list[str]:
    starts, stops = corpus.spans(np.arange(corpus.num_documents))
    return [tokenizer.decode(corpus.read(i, j)[1:-1].tolist()) for i, j in zip(starts, stops, strict=True)]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "files"
    return folder, write_names(folder)


@pytest.fixture(scope="module")
def source(names):
    return domain_names(str(names[0]))


@pytest.fixture(scope="module")
def tokenizer(source):
    return domain_tokenizer(source, num_suffixes=4)


def test_suffixes_are_counted_as_the_package_splits_names(names, source):
    counts = Counter(PSL.publicsuffix(name) for name in names[1])
    found = count_suffixes(source)
    assert dict(zip(found.suffixes, found.counts.tolist(), strict=True)) == counts
    assert found.suffixes == sorted(counts)
    for suffix, lowest in zip(found.suffixes, found.lowest, strict=True):
        assert lowest == min(hash_of(name) for name in names[1] if PSL.publicsuffix(name) == suffix)
    few = [name for name in names[1] if counts[PSL.publicsuffix(name)] < 100]
    assert found.few_hashes.tolist() == sorted(hash_of(name) for name in few)
    pairs = {int(hash_of(name)): PSL.publicsuffix(name) for name in few}
    assert [found.suffixes[i] for i in found.few_suffixes] == [pairs[one] for one in found.few_hashes.tolist()]


def test_a_suffix_has_a_name_held_out_from_100_names_on(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"n{i}.{s}" for s, n in (("aa", 99), ("bb", 100)) for i in range(n)))
    split = first_split(1).extended(count_suffixes(domain_names(str(tmp_path / "names.txt"))))
    assert split.suffixes == ["aa", "bb"] and split.is_held_out.tolist() == [False, True]
    assert split.chosen.tolist() == [min(int(hash_of(f"n{i}.bb")) for i in range(100))]
    assert sorted(split.few_hashes) == sorted(hash_of(f"n{i}.aa") for i in range(99))


def test_the_suffixes_with_ids_are_the_most_frequent(tokenizer):
    assert tokenizer.domain.suffixes == ["com", "de", "co.uk", "com.br"]


def test_names_and_their_columns(names, source, tokenizer, tmp_path):
    train, validation = prepare_corpus(tmp_path, source, tokenizer, FRACTION, shard_tokens=2000)
    assert train.summary(seq_len=512) == train.summary()  # no warning of short documents
    expected = held_out(names[1], int(FRACTION * 2**64))
    assert names_of(train, tokenizer) == [name for name in names[1] if name not in expected]
    assert names_of(validation, tokenizer) == [name for name in names[1] if name in expected]
    assert len(train.shards) > 3 and {PSL.publicsuffix(name) for name in expected} >= {"com", "de", "co.uk"}
    assert any(hash_of(name) > FRACTION * 2**64 for name in expected)
    ids = {suffix: i for i, suffix in enumerate(tokenizer.domain.suffixes, 1)}
    for corpus in (train, validation):
        corpus.verify()
        suffixes = [PSL.publicsuffix(name) for name in names_of(corpus, tokenizer)]
        found = {key: np.concatenate([shard.columns[key] for shard in corpus.shards]) for key in corpus.column_names}
        assert found["suffix_ids"].tolist() == [ids.get(suffix, 0) for suffix in suffixes]
        lengths = [len(name) for name in names_of(corpus, tokenizer)]
        starts = [1 + length - len(suffix) for length, suffix in zip(lengths, suffixes, strict=True)]
        assert found["suffix_starts"].tolist() == starts
        assert corpus.statistics.characters == corpus.statistics.bytes == sum(lengths)
    assert "skipped 1: corrupt or truncated gzip data\n    " in train.summary()
    assert "skipped 6: underscore" in train.summary() and "names-0.txt" in train.summary()
    assert open_corpus(tmp_path / "train").fingerprint == train.fingerprint


def test_underscores_are_unknown_tokens(tmp_path):
    (tmp_path / "names.txt").write_text("a_b.com\nc.com\n_d_.e.com\n")
    source = domain_names(str(tmp_path / "names.txt"), underscore="accept")
    tokenizer = domain_tokenizer(source)
    train, _ = prepare_corpus(tmp_path / "corpus", source, tokenizer, 0)
    expected = [tokenizer.encode(name) for name in ("a_b.com", "c.com", "_d_.e.com")]
    assert train.read(0, train.num_tokens).tolist() == [token for one in expected for token in one]
    assert train.statistics.unknown == 3


def test_files_are_equal_for_all_numbers_of_threads_and_orders_of_files(names, source, tokenizer, tmp_path):
    for threads in (0, 1, 3):
        prepare_corpus(
            tmp_path / str(threads), source, tokenizer, FRACTION, shard_tokens=900, tokenizer_threads=threads
        )
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "3")
    files = sorted(names[0].iterdir(), key=lambda path: path.name[::-1], reverse=True)
    other = domain_names([str(path) for path in files])
    again = prepare_corpus(tmp_path / "other", other, tokenizer, FRACTION)
    sides = [set(names_of(open_corpus(tmp_path / "0" / split), tokenizer)) for split in ("train", "validation")]
    assert [set(names_of(corpus, tokenizer)) for corpus in again] == sides


class Died(BaseException):
    """What Ctrl+C or a power failure is to the code."""


def test_interrupted_at_every_write_it_continues_to_the_same_files(tmp_path, source, tokenizer, monkeypatch):
    def build(folder, threads):
        prepare_corpus(folder, source, tokenizer, FRACTION, tokenizer_threads=threads, shard_tokens=2500)

    build(tmp_path / "whole", 0)
    expected, synced, die_at = content(tmp_path / "whole"), os.fsync, 0
    monkeypatch.setattr("torchrecipes.data.domains.suffix_counts._latest", None)
    while True:
        die_at += 1
        writes = 0

        def fsync(file, die_at=die_at):
            nonlocal writes
            writes += 1
            if writes == die_at:
                raise Died
            synced(file)

        folder = tmp_path / str(die_at)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(atomic_write.os, "fsync", fsync)
                build(folder, threads=die_at % 3)
        except Died:
            left = {name for name in content(folder) if name.endswith("safetensors")}
            build(folder, threads=1)
            found = content(folder)
            assert found == expected and all(name in found for name in left)
        else:
            break
    assert die_at > 8


def test_names_are_counted_once_for_the_tokenizer_and_the_split(tmp_path, monkeypatch):
    write_names(tmp_path / "names", seed=1)
    source, read = domain_names(str(tmp_path / "names")), []
    blocks = domain_names.blocks
    monkeypatch.setattr(
        domain_names, "blocks", lambda self, position=None: read.append(position) or blocks(self, position)
    )
    prepare_corpus(tmp_path / "corpus", source, domain_tokenizer(source), FRACTION)
    assert read == [None, None]  # to count and to tokenize


def test_few_names(tmp_path, tokenizer):
    (tmp_path / "three.txt").write_text("a.com\nb.com\nc.com\n")
    train, validation = prepare_corpus(tmp_path / "c", domain_names(str(tmp_path / "three.txt")), tokenizer, 0.001)
    assert (train.num_documents, validation.num_documents) == (2, 1)
    (tmp_path / "one.txt").write_text("a.com\na.com\n")
    (tmp_path / "none.txt").write_text("com\n-\n")
    for name, code in (("one", "one_document"), ("none", "no_documents")):
        with pytest.raises(UserError) as caught:
            prepare_corpus(tmp_path / name, domain_names(str(tmp_path / f"{name}.txt")), tokenizer, 0.001)
        assert caught.value.code == code


def test_the_first_names_or_a_source_of_its_own_for_validation(names, source, tokenizer, tmp_path):
    train, validation = prepare_corpus(tmp_path / "a", source, tokenizer, eval_samples=130)
    assert names_of(validation, tokenizer) + names_of(train, tokenizer) == names[1]
    assert validation.num_documents == 130
    (tmp_path / "v.txt").write_text("v.com\nw.org\n")
    other = domain_names(str(tmp_path / "v.txt"))
    train, validation = prepare_corpus(tmp_path / "b", source, tokenizer, validation_source=other)
    assert names_of(validation, tokenizer) == ["v.com", "w.org"] and train.num_documents == len(names[1])


def test_rules_of_source_and_tokenizer_must_be_the_same(names, source, tokenizer, tmp_path):
    other = domain_names(str(names[0]), only_icann=True)
    for call in (
        lambda: prepare_corpus(tmp_path, other, tokenizer),
        lambda: domain_tokenizer(source, only_icann=True),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == "other_suffix_list"


# Additions


@pytest.fixture(scope="module")
def more(tmp_path_factory, names) -> tuple[Path, list[str]]:
    """Names to add: some are there already; there are now 100 of com.br, and many of a suffix that was not there."""
    folder = tmp_path_factory.mktemp("more")
    old = [name for name in names[1] if name.endswith(".com.br")]
    new = [*(f"new{i}.com.br" for i in range(3)), *(f"a{i}.org" for i in range(105))]
    new = [name for name in new if hash_of(name) >= FRACTION * 2**64]  # so that one of each suffix is looked for
    added = [*old[:50], *names[1][:40], *new, *sorted(names[1], key=hash_of)[:1]]
    (folder / "more.txt").write_text("\n".join(added))
    return folder / "more.txt", added


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, source, tokenizer):
    folder = tmp_path_factory.mktemp("corpus") / "c"
    prepare_corpus(folder, source, tokenizer, FRACTION, shard_tokens=4000)
    tokenizer.save(folder / "tokenizer")
    return folder


def sides(folder, tokenizer) -> list[list[str]]:
    return [names_of(open_corpus(folder / split), tokenizer) for split in ("train", "validation")]


def test_additions_follow_the_rule_and_move_no_name(names, more, corpus, tokenizer, tmp_path):
    folder, limit = copy_of(corpus, tmp_path / "c"), int(FRACTION * 2**64)
    train, validation = sides(folder, tokenizer)
    append_to_corpus(folder, domain_names(str(more[0])), tokenizer)
    new_train, new_validation = sides(folder, tokenizer)
    assert new_train[: len(train)] == train and new_validation[: len(validation)] == validation
    assert not set(new_train) & set(new_validation)
    new = [name for name in more[1] if name not in names[1]]
    lowest = {min((name for name in new if name.endswith(suffix)), key=hash_of) for suffix in (".com.br", ".org")}
    wanted = {name for name in more[1] if name in validation or hash_of(name) < limit} | lowest
    assert len(wanted - set(validation)) == 2 and len(wanted) > 2
    assert new_validation[len(validation) :] == [name for name in more[1] if name in wanted]
    assert new_train[len(train) :] == [name for name in more[1] if name not in wanted]
    # Once more, and all of them stay where they are.
    append_to_corpus(folder, domain_names(str(more[0])), tokenizer, again=True)
    assert [set(one) for one in sides(folder, tokenizer)] == [set(new_train), set(new_validation)]
    (tmp_path / "none.txt").write_text("\n".join(name for name in more[1] if name not in wanted))
    records = append_to_corpus(folder, domain_names(str(tmp_path / "none.txt")), tokenizer)
    assert records["validation"]["documents"] == 0
    assert [path.name for path in folder.glob("split-*")] == ["split-00003.safetensors"]
    # A name that is held out for its suffix alone, a second time.
    one = next(name for name in validation if hash_of(name) >= limit)
    (tmp_path / "two.txt").write_text(f"{one}\n{train[0]}")
    records = append_to_corpus(folder, domain_names(str(tmp_path / "two.txt")), tokenizer, again=True)
    assert [records[split]["documents"] for split in ("train", "validation")] == [1, 1]


def test_an_addition_that_dies_leaves_the_corpus_and_is_completed(more, corpus, tokenizer, tmp_path, monkeypatch):
    source, synced, found = domain_names(str(more[0])), os.fsync, []
    whole = copy_of(corpus, tmp_path / "whole")
    append_to_corpus(whole, source, tokenizer, tokenizer_threads=0)
    for die_at in range(1, 40):
        folder, writes = copy_of(corpus, tmp_path / str(die_at)), 0

        def fsync(file, die_at=die_at):
            nonlocal writes
            writes += 1
            if writes == die_at:
                raise Died
            synced(file)

        try:
            with monkeypatch.context() as patched:
                patched.setattr(atomic_write.os, "fsync", fsync)
                append_to_corpus(folder, source, tokenizer, tokenizer_threads=0)
        except Died:
            assert sides(folder, tokenizer) in (sides(corpus, tokenizer), sides(whole, tokenizer))
            append_to_corpus(folder, source, tokenizer, tokenizer_threads=0)
            found.append(sides(folder, tokenizer))
            assert [path.name for path in folder.glob("split-*")] == ["split-00001.safetensors"]
        else:
            break
    assert len(found) > 5 and all(one == sides(whole, tokenizer) for one in found)


def test_documents_are_not_added_to_names(names, corpus, tokenizer, tmp_path):
    with pytest.raises(UserError) as caught:
        append_to_corpus(copy_of(corpus, tmp_path / "c"), files(str(names[0]), sample_by="line"), tokenizer)
    assert caught.value.code == "other_split"


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_split_is_found(more, corpus, tokenizer, tmp_path, damage):
    folder = copy_of(corpus, tmp_path / "c")
    (path,) = folder.glob("split-*")
    content = bytearray(path.read_bytes())
    content[-70] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-8] if damage == "cut" else content)
        assert main(["data", "verify", str(folder)]) == 2
    with pytest.raises(UserError) as caught:
        append_to_corpus(folder, domain_names(str(more[0])), tokenizer)
    assert caught.value.code == "corrupt_corpus"


# Streams, mixtures and job arrays


def test_a_stream_holds_out_by_the_hash_alone(names, source, tokenizer, tmp_path):
    settings = corpus_settings(source, tokenizer, FRACTION, None, None, 900, is_stream=True)
    seen: list[int] = []
    build_corpus(tmp_path, source, tokenizer, settings, throttle=seen.append)
    low = {name for name in names[1] if hash_of(name) < FRACTION * 2**64}
    expected = [[name for name in names[1] if (name in low) == side] for side in (False, True)]
    assert sides(tmp_path, tokenizer) == expected and low
    assert seen == sorted(seen) and seen[-1] > 1 and not list(tmp_path.glob("split-*"))


def test_suffixes_of_the_beginning_and_of_a_mixture(names, source, more, tokenizer):
    beginning = beginning_of(source, 1)  # one block: of a small file, all of it
    first = [
        line.lower() for line in (names[0] / "names-0.txt").read_text().splitlines() if "." in line and "_" not in line
    ]
    expected = Counter(PSL.publicsuffix(name) for name in first)
    found = count_suffixes(beginning)
    assert dict(zip(found.suffixes, found.counts.tolist(), strict=True)) == expected
    both = Counter(PSL.publicsuffix(name) for name in [*names[1], *more[1]])
    sources = {"a": source, "b": domain_names(str(more[0]))}
    made = domain_tokenizer(Mixture(sources, None, 1.0, {}, ()), num_suffixes=3)
    assert made.domain.suffixes == sorted(both, key=lambda suffix: (-both[suffix], suffix))[:3]


def test_names_are_not_prepared_in_parts(source):
    with pytest.raises(UserError) as caught:
        SourcePart(source, 0, 2)
    assert caught.value.code == "names_in_parts"
