"""Gopher's and C4's heuristics: of every rule a text that passes and one that does not; language identification."""

import random
import sys
from collections import Counter

import numpy as np
import pytest

from torchrecipes.data.cleaning import C4, GopherQuality, GopherRepetition, Language, Removal, gopher
from torchrecipes.data.cleaning.c4 import count_sentences, ends_in_punctuation
from torchrecipes.errors import UserError


def rule(result):
    return result.rule if isinstance(result, Removal) else None


def words(count, seed=0):
    """A text of different words of four to seven letters and two stop words."""
    draw = random.Random(seed)
    made = ["".join(draw.choices("abcdefghij", k=draw.randint(4, 7))) for _ in range(count - 2)]
    return " ".join(["the", "of", *made])


GOOD = words(100)


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("min_words", words(50), words(49)),
        ("max_words", words(100_000), words(100_001)),
        ("min_mean_word_length", "the have " + "abc " * 60, "the have " + "ab " * 60),
        ("max_mean_word_length", "the of " + "abcdefghij " * 60, "the of " + "abcdefghijk " * 60),
        ("max_symbol_word_ratio", GOOD + " #" * 11, GOOD + " #" * 12),
        ("max_symbol_word_ratio", GOOD + "a… " * 11 + "and", GOOD + "a... " * 13 + "and"),
        ("max_bullet_lines", "-one line\n" * 90 + "the line of\n" * 10, "•one line\n" * 91 + "the line of\n" * 9),
        ("max_ellipsis_lines", (GOOD + "\n") * 7 + (GOOD + "...\n") * 3, (GOOD + "\n") * 6 + (GOOD + "…\n") * 4),
        ("min_alphabetic_words", GOOD + " 1234" * 25, GOOD + " 1234" * 26),
        ("min_stop_words", GOOD, GOOD.replace("of ", "", 1)),
        ("min_stop_words", GOOD.replace("the of", "The OF"), "the the " + GOOD.replace("of ", "", 1)),
    ],
)
def test_gopher_quality(option, good, bad):
    assert GopherQuality()(good) == good
    assert rule(GopherQuality()(bad)) == f"gopher_quality.{option}"
    assert GopherQuality(**{option: None})(bad) == bad


LINES = [words(12, seed) for seed in range(100)]


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("max_duplicate_lines", [*LINES[:70], *["x"] * 30], [*LINES[:69], *["x"] * 32]),
        ("max_duplicate_line_characters", [*LINES[:85], *LINES[:15]], [*LINES[:75], *LINES[:25]]),
    ],
)
def test_gopher_repetition_of_lines_and_paragraphs(option, good, bad):
    only = dict.fromkeys(GopherRepetition.__dataclass_fields__)
    for name, end in (("line", "\n"), ("paragraph", "\n\n")):
        name = option.replace("line", name)
        step = GopherRepetition(**{**only, name: getattr(GopherRepetition, name)})
        assert rule(step(end.join(good))) is None
        assert rule(step(end.join(bad))) == f"gopher_repetition.{name}"
    assert rule(GopherRepetition(max_duplicate_ngrams=None, max_top_ngrams=None)("\n".join(bad))) is not None


@pytest.mark.parametrize("n", range(2, 11))
def test_gopher_repetition_of_ngrams(n):
    # An n-gram that occurs several times among words that occur once.
    def text(share):
        phrase = [f"aaa{number:02d}" for number in range(n)]
        others = iter(f"w{number:04d}" for number in range(10_000))
        times = 10
        filler = round(n * (1 - share) / share)
        return " ".join(word for _ in range(times) for word in [*phrase, *(next(others) for _ in range(filler))])

    bound = {**gopher.TOP_NGRAMS, **gopher.DUPLICATE_NGRAMS}[n]
    top, duplicated = gopher.ngram_shares(text(bound * 0.8).split())
    assert {**top, **duplicated}[n] == pytest.approx(bound * 0.8, rel=0.1)
    # Only n-grams of length n are bounded, as the phrase repeats shorter ones, too.
    option = "max_top_ngrams" if n in gopher.TOP_NGRAMS else "max_duplicate_ngrams"
    bounds = tuple(
        bound if of == n else 1.0 for of in (gopher.TOP_NGRAMS if n in gopher.TOP_NGRAMS else gopher.DUPLICATE_NGRAMS)
    )
    step = GopherRepetition(**{"max_top_ngrams": None, "max_duplicate_ngrams": None, option: bounds})
    assert rule(step(text(bound * 0.8))) is None
    assert rule(step(text(bound * 1.2))) == f"gopher_repetition.{option}"


def test_ngram_shares_against_a_loop():
    rng = np.random.default_rng(0)
    text = [f"{'x' * rng.integers(1, 5)}{number}" for number in rng.integers(0, 12, 300)]
    top, duplicated = gopher.ngram_shares(text)
    total = sum(map(len, text))
    for n in range(2, 11):
        ngrams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        counts = Counter(ngrams)
        if n in top:
            most = max(counts.values())
            choices = [gram for gram, count in counts.items() if count == most and count > 1]
            values = [covered(ngrams, {gram}, text, n) / total for gram in choices] or [0.0]
            assert any(top[n] == pytest.approx(value) for value in values)
        else:
            repeated = {gram for gram, count in counts.items() if count > 1}
            assert duplicated[n] == pytest.approx(covered(ngrams, repeated, text, n) / total)
    assert gopher.ngram_shares([]) == gopher.ngram_shares(["one"])


def covered(ngrams, wanted, text, n):
    inside = {i + j for i, gram in enumerate(ngrams) if gram in wanted for j in range(n)}
    return sum(len(text[i]) for i in inside)


def test_gopher_thresholds_are_those_of_table_a1():
    step = GopherRepetition()
    assert (step.max_duplicate_lines, step.max_duplicate_paragraphs) == (0.30, 0.30)
    assert (step.max_duplicate_line_characters, step.max_duplicate_paragraph_characters) == (0.20, 0.20)
    assert step.max_top_ngrams == (0.20, 0.18, 0.16)
    assert step.max_duplicate_ngrams == (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)


PAGE = 'This is the first sentence here. And this is the second one!\nIs there a third one? "There is a quoted one."'


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("terminal_punctuation", "A heading has no full stop"),
        ("terminal_punctuation", "It goes on for a while..."),
        ("min_words_per_line", "Only four words here."),
        ("javascript", "Please turn on JavaScript in your browser."),
        ("policy", "By reading on you accept our Cookie Policy."),
        ("policy", "This site uses cookies for your comfort."),
    ],
)
def test_c4_removes_lines(option, line):
    assert C4()(PAGE) == PAGE
    assert C4()(f"{PAGE}\n{line}") == PAGE
    off = {"min_words_per_line": None}.get(option, False)
    assert C4(**{option: off})(f"{PAGE}\n{line}") == f"{PAGE}\n{line}"


@pytest.mark.parametrize(
    ("option", "page"),
    [
        ("lorem_ipsum", PAGE + " Lorem ipsum dolor sit amet."),
        ("curly_bracket", PAGE + " This is { not a text."),
        ("min_sentences", "There is one sentence here. And a second one follows."),
    ],
)
def test_c4_removes_pages(option, page):
    assert rule(C4()(page)) == f"c4.{option}"
    off = {"min_sentences": None}.get(option, False)
    assert C4(**{option: off})(page) == page


def test_c4_citations_bad_words_and_empty_pages(tmp_path):
    assert C4()(PAGE.replace("here.", "here.[1][citation needed][[2]]")) == PAGE
    assert C4(citations=False, terminal_punctuation=False)(PAGE + "[1]") == PAGE + "[1]"
    assert rule(C4()("no punctuation at all\nin these lines")) == "c4.no_lines"
    (tmp_path / "words.txt").write_text("quoted one\nfir\n")
    step = C4(bad_words=str(tmp_path / "words.txt"))
    assert rule(step(PAGE)) == "c4.bad_words"
    assert step(PAGE.replace("quoted", "cited")) == PAGE.replace("quoted", "cited"), "fir is a part of first"
    with pytest.raises(UserError) as error:
        C4(bad_words=str(tmp_path / "none.txt"))(PAGE)
    assert (error.value.key, error.value.code) == ("c4.bad_words", "unreadable_file")


def test_c4_is_idempotent():
    text = "\n".join([PAGE, "", "Menu", "  A line with blanks around it stays.  ", "Home | About", "", PAGE])
    once = C4()(text)
    assert once != text and C4()(once) == once


def test_sentences_and_punctuation():
    assert count_sentences('One. Two! "Three?" 3.14 is no end. e.g.') == 5
    assert [ends_in_punctuation(line) for line in ("a.", "a. ", 'a."', "a:", "a...", "")] == [True] * 3 + [False] * 3


def test_language():
    pytest.importorskip("py3langid")
    english, german = (
        "The cat sat on the mat and was happy about it.",
        "Die Katze saß auf der Matte und freute sich darüber.",
    )
    assert Language()(english) == english
    assert rule(Language()(german)) == "language.keep"
    assert Language(keep=("de", "en"))(german) == german
    assert rule(Language(min_probability=1.0)("the zzz")) in ("language.min_probability", "language.keep")
    assert not Language().check()
    (error,) = Language(keep=("en", "xx")).check()
    assert (error.key, error.code) == ("keep", "unknown_language")


def test_language_names_the_package_that_is_missing(monkeypatch):
    from torchrecipes.data.cleaning import language

    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    (error,) = Language().check()
    assert error.code == "missing_package" and "torchrecipes[clean]" in error.hint
