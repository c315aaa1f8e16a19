"""`clean`: its output for any number of jobs, after any interruption, and when its output is cleaned again."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from torchrecipes.data.cleaning import clean, estimated_jaccard, minhash, pieces, read_steps
from torchrecipes.data.cleaning.output import read_lines
from torchrecipes.data.sources import files
from torchrecipes.errors import UserError

ALL = (
    "normalize",
    "c4",
    "boilerplate_lines",
    "gopher_quality",
    "gopher_repetition",
    "exact_duplicates",
    "near_duplicates",
)
FILTERS = ("boilerplate_lines.min_documents=10", "gopher_quality.min_words=20", "boilerplate_lines.min_share=0")
NOTICE = "Subscribe to our newsletter and never miss a word of it."


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_DOCUMENTS", 12)
    monkeypatch.setattr(pieces, "PART_BYTES", 20_000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # pieces are many here, and disks slow


def sentence(rng):
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(rng.randint(8, 14))]
    return f"The {' '.join(words)} of it."


@pytest.fixture
def raw(tmp_path):
    """A folder of files: good documents, duplicates of every kind, short ones, notices that recur, bad records."""
    rng = random.Random(0)
    texts = []
    for number in range(160):
        page = "\n".join(sentence(rng) for _ in range(rng.randint(3, 9)))
        if number % 3 == 0:
            page += "\n" + NOTICE
        texts.append(page)
    texts += rng.sample(texts, 20)  # exact
    texts += ["  " + text.replace(" ", "  ") for text in rng.sample(texts, 10)]  # but for white space
    texts += [text + " One more sentence of it." for text in rng.sample(texts, 20)]  # near
    texts += ["Too short.", "x = {1: 2}", "\u200b", "Lorem ipsum is not. A text of any. Kind at all.", NOTICE]
    rng.shuffle(texts)
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(7):
        lines = [json.dumps({"text": text}) for text in texts[number::7]]
        lines.insert(3, '{"text": null}')
        data = "\n".join(lines).encode()
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(data)) if number == 3 else (
            folder / f"{number}.jsonl"
        ).write_bytes(data)
    return folder


def source(path, **options):
    return files(str(path), on_bad_record="skip", **options)


def documents(folder):
    return [json.loads(line) for file in sorted(Path(folder, "documents").iterdir()) for line in read_lines(file)]


def contents(folder):
    """What the folder holds, but for the settings and the lock."""
    names = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.name != "cleaning.json"}


def test_every_step_counts_what_it_removes_and_the_rest_is_unchanged(tmp_path, raw):
    steps = read_steps([*ALL, *FILTERS])
    report = clean(source(raw), tmp_path / "out", steps, workers=0)
    kept = documents(tmp_path / "out")
    read = {document.source: document.text for document in source(raw)}
    assert report["documents"] == len(read) and report["kept_documents"] == len(kept)
    assert report["characters"] == sum(map(len, read.values()))
    assert report["kept_characters"] == sum(len(document["text"]) for document in kept)
    removed = {rule: counts["documents"] for rule, counts in report["removed"].items()}
    assert len(read) - len(kept) == sum(removed.values())
    assert {"c4.lorem_ipsum", "c4.curly_bracket", "c4.min_sentences", "normalize.empty"} <= set(removed)
    assert {"exact_duplicates", "near_duplicates"} <= set(removed)
    assert report["bad_records"]["the text is null"]["records"] == 7
    assert report["changed"]["boilerplate_lines"]["documents"] > 30
    for document in kept:
        lines = [line for line in read[document["source"]].split("\n") if line != NOTICE]
        assert document["text"] == "\n".join(lines)
    signatures = minhash([document["text"] for document in kept])
    assert max(float(estimated_jaccard(*signatures[list(pair)])) for pair in combinations(range(len(kept)), 2)) < 0.8
    order = [document.source for document in source(raw)]
    assert [document["source"] for document in kept] == [name for name in order if name in {d["source"] for d in kept}]
    assert not (tmp_path / "out/.work").exists()


def test_cleaning_what_is_clean_removes_and_changes_nothing(tmp_path, raw):
    steps = read_steps([*ALL, *FILTERS])
    clean(source(raw), tmp_path / "once", steps, workers=0)
    report = clean(source(tmp_path / "once/documents"), tmp_path / "twice", steps, workers=0)
    assert (report["removed"], report["changed"]) == ({}, {})
    assert [d["text"] for d in documents(tmp_path / "once")] == [d["text"] for d in documents(tmp_path / "twice")]


@pytest.mark.parametrize("num_shards", [2, 5, 11])
def test_several_jobs_write_what_one_does(tmp_path, raw, num_shards):
    steps = read_steps([*ALL, *FILTERS])
    held_out = {"eval_sets": [source(raw / "2.jsonl")]}
    clean(source(raw), tmp_path / "one", steps, workers=0, **held_out)
    for stage in ("lines", "filter", "merge", "remove"):
        jobs = list(range(num_shards)) if stage != "merge" else [0]
        random.Random(num_shards).shuffle(jobs)
        for index in jobs:
            job = {"shard_index": index, "num_shards": num_shards, "stage": stage}
            assert clean(source(raw), tmp_path / "many", steps, workers=0, **job, **held_out) is None
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "many/cleaning.json").read_text())["complete"]


def test_worker_processes_write_what_one_process_does(tmp_path, raw):
    steps = read_steps(["normalize", "c4", "exact_duplicates", "near_duplicates"])
    clean(source(raw), tmp_path / "one", steps, workers=0)
    settings = json.loads((tmp_path / "one/cleaning.json").read_text())
    clean(source(raw), tmp_path / "two", steps, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "two/cleaning.json").read_text()) == settings


def die_at_a_write(number):
    """Ends this process within its `number`-th write, so that a temporary file is left over."""
    original = os.fsync

    def fsync(descriptor):
        nonlocal number
        number -= 1
        if not number:
            os._exit(9)
        original(descriptor)

    os.fsync = fsync


def test_a_job_that_dies_at_any_write_goes_on_from_there(tmp_path, raw):
    steps = read_steps([*ALL, *FILTERS])
    clean(source(raw), tmp_path / "one", steps, workers=0)
    rng, codes, done = random.Random(0), [], {}
    while 0 not in codes:
        number = rng.randint(1, 40)
        child = os.fork()
        if child == 0:
            die_at_a_write(number)
            clean(source(raw), tmp_path / "killed", steps, workers=0)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        records = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/.work").rglob("*.json")}
        assert codes[-1] == 0 or done.items() <= records.items(), "nothing is done twice"
        done = records
    assert len(codes) > 5 and set(codes) == {0, 9}
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_worker_processes_end_with_a_parent_that_is_killed():
    code = (
        "import os, signal\n"
        "from torchrecipes.data.cleaning.pieces import _in_workers\n"
        "results = _in_workers(abs, iter([-1] * 9), 1)\n"
        "next(results)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Returns when the last process that has its standard output is gone.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_what_is_finished_is_not_read_again(tmp_path, raw, monkeypatch):
    steps = read_steps(["normalize"])
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": f"document {n} of the file"}) + "\n" for n in range(30_000)))
    monkeypatch.setattr(pieces, "PIECE_DOCUMENTS", 5_000)
    read = source(big)
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(pieces._Finish, "__call__", interrupt_after(4, pieces._Finish.__call__))
        clean(read, tmp_path / "out", steps, workers=0)
    monkeypatch.undo()
    monkeypatch.setattr(pieces, "PIECE_DOCUMENTS", 5_000)
    monkeypatch.setattr(pieces, "PART_BYTES", 20_000)
    read = source(big)
    clean(read, tmp_path / "out", steps, workers=0)
    assert read.report.documents <= 10_000, "the copy that was read began after the first four pieces"
    assert [document["text"] for document in documents(tmp_path / "out")] == [
        f"document {n} of the file" for n in range(30_000)
    ]


def interrupt_after(count, original):
    def call(self, piece):
        nonlocal count
        if not count:
            raise KeyboardInterrupt
        count -= 1
        return original(self, piece)

    return call


def test_duplicates_of_other_texts_go_and_those_stay(tmp_path, raw):
    texts = [document.text for document in source(raw)]
    long = [text for text in texts if len(text.split()) > 60]
    against, held_out = tmp_path / "against.jsonl", tmp_path / "held_out.jsonl"
    against.write_text(json.dumps({"text": long[0] + " More."}) + "\n" + json.dumps({"text": "something else"}))
    held_out.write_text(json.dumps({"text": long[1]}))
    steps = read_steps(["normalize", "exact_duplicates", "near_duplicates"])
    plain = clean(source(raw), tmp_path / "plain", steps, workers=0)
    report = clean(
        source(raw), tmp_path / "out", steps, against=[source(against)], eval_sets=[source(held_out)], workers=0
    )
    kept = {document["text"] for document in documents(tmp_path / "out")}
    assert long[0] not in kept and long[1] not in kept and "something else" not in kept
    assert report["removed"]["near_duplicates.against"]["documents"] >= 1
    assert report["removed"]["exact_duplicates.evaluation"]["documents"] >= 1
    assert report["documents"] == plain["documents"], "references are not counted"
    assert {(one["kind"], one["documents"]) for one in report["references"]} == {("evaluation", 1), ("against", 2)}
    (example, *_) = report["examples"]["exact_duplicates.evaluation"]
    assert "held_out.jsonl:1" in example["detail"]


def test_exempt_sources_are_only_normalized_and_compared(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    code = "def f(x):\n    return {x: 1}\u200b"
    for name, text in (("a.py.txt", code), ("b.py.txt", code), ("c.txt", code), ("d.txt", "e\u0301")):
        (folder / name).write_text(text)
    steps = read_steps([*ALL, "exempt=['*.py.txt']"])
    report = clean(source(folder), tmp_path / "out", steps, workers=0)
    (kept,) = documents(tmp_path / "out")
    assert kept["text"] == code.replace("\u200b", "") and kept["source"].endswith("a.py.txt:1")
    assert set(report["removed"]) == {"exact_duplicates", "c4.curly_bracket", "c4.no_lines"}


def test_boilerplate_needs_count_share_and_length(tmp_path):
    line, short = "A line that is long enough to be one.", "A short line."
    texts = [f"Document {n}.\n{line}\n{short}" for n in range(20)] + [f"Other document {n}." for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for count, share, goes in ((20, 0.2, True), (21, 0.0, False), (2, 0.21, False), (20, 0.0, True)):
        options = [f"boilerplate_lines.min_documents={count}", f"boilerplate_lines.min_share={share}"]
        folder = tmp_path / f"{count}-{share}"
        clean(source(tmp_path / "a.jsonl"), folder, read_steps(options), workers=0)
        kept = [document["text"] for document in documents(folder)]
        assert kept == [text.replace(line + "\n", "") if goes else text for text in texts]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_reports_escape_what_they_show_and_load_nothing(tmp_path):
    evil = "<script src='http://evil.example/x.js'>alert(1)</script>\n```\n# heading\n| a | b |"
    (tmp_path / "a<b>.jsonl").write_text("\n".join([json.dumps({"text": evil})] * 2))
    clean(source(tmp_path / "a<b>.jsonl"), tmp_path / "out", read_steps(), workers=0)
    page = Page()
    text = (tmp_path / "out/report.html").read_text()
    page.feed(text)
    assert evil in page.text and "a<b>.jsonl:2" in page.text
    allowed = "html head meta title style body h1 h2 table tr th td details summary p code pre".split()
    assert {tag for tag, _ in page.tags} <= set(allowed)
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    markdown = (tmp_path / "out/report.md").read_text()
    fences = [line for line in markdown.split("\n") if re.fullmatch("````(text)?", line)]
    assert len(fences) == 2 and evil in markdown


def test_a_folder_of_another_job_is_refused(tmp_path, raw):
    steps = read_steps(["normalize"])
    clean(source(raw), tmp_path / "out", steps, workers=0)
    before = contents(tmp_path / "out")
    assert clean(source(raw), tmp_path / "out", steps, workers=0)["documents"] > 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    for folder, path, words in (
        ("out", raw, ["normalize.form=NFKC"]),
        ("out", raw / "1.jsonl", ["normalize"]),
        ("mine", raw, ["normalize"]),
    ):
        with pytest.raises(UserError) as error:
            clean(source(path), tmp_path / folder, read_steps(words), workers=0)
        assert (error.value.code, error.value.key) == ("other_output", "--output")
    assert contents(tmp_path / "out") == before


def test_wrong_steps_and_jobs_are_refused(tmp_path, raw):
    for words, code, hint in (
        (["gopher_qualty"], "unknown_step", "gopher_quality"),
        (["c5.min_sentences=3"], "unknown_step", "c4"),
        (["c4.min_sentence=3"], "invalid_config", ""),
        (["near_duplicates.jaccard=1.5"], "invalid_config", ""),
    ):
        with pytest.raises(UserError) as error:
            read_steps(words)
        assert error.value.code == code and hint in (error.value.hint or "")
    (tmp_path / "steps.yaml").write_text("c4: {min_sentences: 5}\nnormalize: {}\nlanguage:\n")
    steps = read_steps([str(tmp_path / "steps.yaml"), "c4.javascript=false"])
    assert steps.names() == ["normalize", "c4"] and steps.c4.min_sentences == 5 and not steps.c4.javascript
    for options, code, key in (
        ({"num_shards": 2}, "missing_stage", "--stage"),
        ({"num_shards": 2, "shard_index": 2, "stage": "filter"}, "out_of_range", "--shard-index"),
        ({"stage": "lines"}, "unknown_stage", "--stage"),
        ({"stage": "merge"}, "unfinished_stage", "--stage"),
        ({"stage": "remove"}, "unfinished_stage", "--stage"),
    ):
        with pytest.raises(UserError) as error:
            clean(source(raw), tmp_path / "out", read_steps(), workers=0, **options)
        assert (error.value.code, error.value.key) == (code, key)
    with pytest.raises(UserError) as error:
        clean(source(raw), tmp_path / "new", read_steps(["c4"]), against=[source(raw)])
    assert (error.value.code, error.value.key) == ("unused_option", "--against")


SHARED = Path(os.environ.get("TORCHRECIPES_DATA", Path(__file__).parents[4] / "shared" / "data")) / "bad"
DOCUMENTS = {
    "control_ok.jsonl": 10,
    "control_ok.parquet": 200,
    "blank_lines.jsonl": 10,
    "no_final_newline.jsonl": 10,
    "utf8_bom.jsonl": 10,
    "crlf.jsonl": 10,
    "u2028_in_string.jsonl": 2,
    "null_text.jsonl": 1,
    "null_text.parquet": 2,
    "truncated.jsonl": 9,
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
def test_damaged_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_DOCUMENTS", 8_192)
    found = sorted(path for path in SHARED.rglob("*") if path.is_file() and path != SHARED / "README.md")
    assert len(found) == 57
    for number, path in enumerate(found):
        folder = tmp_path / str(number)
        try:
            report = clean(source(path), folder, read_steps(), workers=0)
        except UserError as error:
            assert error.code == "no_documents", path
            continue
        kept = documents(folder)
        assert report["kept_documents"] == len(kept)
        assert all(document["text"] and "\r" not in document["text"] for document in kept), path
        unchanged = clean(source(path), tmp_path / f"{number}-all", read_steps(["normalize"]), workers=0)
        if path.name in DOCUMENTS:
            assert unchanged["kept_documents"] == DOCUMENTS[path.name], path
        if path.name == "duplicates.jsonl":
            assert len(kept) == 1
        if path.name == "control_chars.txt":
            assert not re.search("[\x00-\x08\u200b\ufeff\u202e]", kept[0]["text"])
        if path.name == "single_line_1mb.txt":
            assert np.sum([len(document["text"]) for document in documents(tmp_path / f"{number}-all")]) == 1 << 20
