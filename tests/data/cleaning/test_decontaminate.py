"""`decontaminate` against a loop over n-grams, its actions, its report, several jobs."""

import json
import random
import re

import numpy as np
import pytest

from torchrecipes.data.cleaning import decontaminate, pieces
from torchrecipes.data.cleaning.evaluation_overlap import cut_around
from torchrecipes.data.cleaning.output import read_lines
from torchrecipes.data.sources import files
from torchrecipes.errors import UserError

N = 5


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return files(str(path))


def documents(folder):
    return [json.loads(line) for file in sorted((folder / "documents").iterdir()) for line in read_lines(file)]


def ngrams(text, n=N):
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Training documents and two evaluation sets; every third document holds a passage of an evaluation document."""
    monkeypatch.setattr(pieces, "PIECE_DOCUMENTS", 9)
    rng = random.Random(0)

    def text(count):
        return " ".join(f"w{rng.randrange(5_000)}" for _ in range(count))

    held_out = [text(rng.randint(3, 60)) for _ in range(30)]
    train = []
    for number in range(100):
        words = text(rng.randint(20, 400)).split()
        if number % 3 == 0:
            passage = rng.choice(held_out).split()
            start = rng.randint(0, len(passage) - 1)
            place = rng.randint(0, len(words))
            words[place:place] = (
                " ".join(passage[start : start + rng.randint(2, 30)]).upper().replace(" ", ", ").split()
            )
        train.append(" ".join(words))
    phrase = text(N + 2)
    train = [f"{one} {phrase}" if number < 12 else one for number, one in enumerate(train)]
    held_out.append(f"{phrase} {text(10)}")
    sets = [write(tmp_path / "test.jsonl", held_out[:20]), write(tmp_path / "dev.jsonl", held_out[20:])]
    return write(tmp_path / "train.jsonl", train), sets, train, held_out


def compared(train, held_out, limit):
    """The n-grams of evaluation documents in training, but those in more than `limit` training documents."""
    wanted = {ngram for text in held_out for ngram in ngrams(text)}
    counts = {}
    for text in train:
        for ngram in wanted & set(ngrams(text)):
            counts[ngram] = counts.get(ngram, 0) + 1
    return {ngram for ngram, count in counts.items() if count <= limit}


@pytest.mark.parametrize(("limit", "max_share"), [(10, 0.0), (1_000, 0.0), (10, 0.05)])
def test_what_is_removed_is_what_a_loop_finds(tmp_path, data, limit, max_share):
    source, sets, train, held_out = data
    found = compared(train, held_out, limit)
    report = decontaminate(
        source, tmp_path / "out", sets, n=N, action="remove", max_documents=limit, max_share=max_share, workers=0
    )

    def share(text):
        return sum(ngram in found for ngram in ngrams(text)) / len(ngrams(text))

    wanted = [text for text in train if share(text) <= max_share]
    assert [document["text"] for document in documents(tmp_path / "out")] == wanted
    assert 5 < len(train) - len(wanted) == report["overlapping_documents"] == report["removed"]["overlap"]["documents"]
    parts = (held_out[:20], held_out[20:])
    for one, texts in zip(report["references"], parts, strict=True):
        assert one["documents"] == len(texts)
        assert one["shorter than 5 words"] == sum(not ngrams(text) for text in texts)
        assert one["with an n-gram in training"] == sum(bool(found & set(ngrams(text))) for text in texts)


def test_cutting_leaves_no_overlap_and_only_long_pieces(tmp_path, data):
    source, sets, train, held_out = data
    report = decontaminate(source, tmp_path / "out", sets, n=N, workers=0)
    found = compared(train, held_out, 10)
    kept = documents(tmp_path / "out")
    assert report["written_documents"] == len(kept)
    assert report["kept_characters"] == sum(len(document["text"]) for document in kept)
    assert not any(found & set(ngrams(document["text"])) for document in kept)
    by_source = {}
    for document in kept:
        by_source.setdefault(document["source"].split(" (")[0], []).append(document["text"])
    for number, text in enumerate(train, 1):
        left = by_source.get(f"{tmp_path}/train.jsonl:{number}", [])
        if found & set(ngrams(text)):
            assert all(piece in text and len(piece) >= 200 for piece in left)
        else:
            assert left == [text]
    assert max(map(len, by_source.values())) == 2 and {"overlap.cut", "overlap.nothing_left"} <= set(report["examples"])


def test_a_report_changes_nothing(tmp_path, data):
    source, sets, train, _ = data
    report = decontaminate(source, tmp_path / "out", sets, n=N, action="report", workers=0)
    assert report["overlapping_documents"] > 10 and report["examples"]["overlap"]
    assert report["removed"] == {} and report["kept_documents"] == len(train)
    assert list((tmp_path / "out/documents").iterdir()) == []


def test_several_jobs_write_what_one_does(tmp_path, data):
    source, sets, _, _ = data
    one = decontaminate(source, tmp_path / "one", sets, n=N, workers=0)
    for stage, jobs in (("count", (2, 0, 1)), ("filter", (1, 0, 2)), ("merge", (0,))):
        for job in jobs:
            decontaminate(source, tmp_path / "many", sets, n=N, workers=0, stage=stage, shard_index=job, num_shards=3)
    assert json.loads((tmp_path / "many/report.json").read_text()) == one
    assert documents(tmp_path / "many") == documents(tmp_path / "one")


def spans(*edges):
    return np.array(edges)


def test_pieces_around_spans():
    text = "".join(chr(97 + number % 26) for number in range(2_000))
    assert cut_around(text, spans(800), spans(900)) == [text[:600], text[1100:]]
    assert cut_around(text, spans(100, 300), spans(150, 400)) == [text[600:]]
    assert cut_around(text, spans(399), spans(1601)) == []
    assert cut_around(text, spans(400), spans(1600)) == [text[:200], text[1800:]]


def test_documents_of_many_pieces_are_removed(tmp_path):
    rng = random.Random(0)
    passage = " ".join(f"secret{number}" for number in range(8))
    filler = [" ".join(f"w{rng.randrange(9_000)}" for _ in range(150)) for _ in range(12)]
    texts = [f" {passage} ".join(filler[:10]), f" {passage} ".join(filler[:11])]
    source = write(tmp_path / "train.jsonl", texts)
    report = decontaminate(source, tmp_path / "out", [write(tmp_path / "test.jsonl", [passage])], n=N, workers=0)
    assert report["removed"]["overlap.too_many_pieces"]["documents"] == 1
    assert [document["source"].split(":")[-1] for document in documents(tmp_path / "out")] == [
        "1",
        *(f"1 (piece {number})" for number in range(2, 11)),
    ]


def test_wrong_arguments(tmp_path, data):
    source, sets, _, _ = data
    for options, key, code in (
        ({"action": "delete"}, "--action", "invalid_value"),
        ({"n": 0}, "-n", "out_of_range"),
        ({"max_share": 2}, "--max-share", "out_of_range"),
        ({"n": 100}, "--eval-sets", "no_ngrams"),
        ({"stage": "remove"}, "--stage", "unknown_stage"),
    ):
        with pytest.raises(UserError) as error:
            decontaminate(source, tmp_path / f"out{options}", sets, workers=0, **options)
        assert (error.value.key, error.value.code) == (key, code)
    decontaminate(source, tmp_path / "out", sets, n=N, workers=0)
    with pytest.raises(UserError) as error:
        decontaminate(source, tmp_path / "out", sets[:1], n=N, workers=0)
    assert error.value.code == "other_output"
