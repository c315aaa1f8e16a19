"""Public suffixes: every rule, and names made from all of them, have the answer of `publicsuffixlist`."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

publicsuffixlist = pytest.importorskip("publicsuffixlist")

from torchrecipes.data.domains import PublicSuffixList, parse_lines  # noqa: E402
from torchrecipes.data.domains.suffix_table import SuffixTable  # noqa: E402
from torchrecipes.errors import UserError  # noqa: E402

SHARED = Path(os.environ.get("TORCHRECIPES_DATA", Path(__file__).parents[4] / "shared" / "data")) / "domain_names"

# Wildcards over plain rules, exceptions to them, rules inside rules, and what has no rule of its own.
RULES = """
// ===BEGIN ICANN DOMAINS===
com
uk
co.uk
*.ck
!www.ck
jp
*.kobe.jp
!city.kobe.jp
日本
テスト.日本
// ===END ICANN DOMAINS===
// ===BEGIN PRIVATE DOMAINS===
a.very.long.name.of.a.private.owner.com
b.very.long.name.of.a.private.owner.com
*.compute.com
// ===END PRIVATE DOMAINS===
"""


def joined(names):
    return np.frombuffer("".join(names).encode(), np.uint8), np.array([len(name) for name in names])


def suffixes(psl, names):
    return [name[start:] for name, start in zip(names, psl.suffix_starts(*joined(names)).tolist(), strict=True)]


def names_of(rules):
    """For each rule the tail it speaks of, with what stands for a wildcard and without, and labels before it."""
    for rule in rules:
        rule = rule.removeprefix("!")
        for tail in {rule.replace("*", "any"), rule.removeprefix("*."), rule.partition(".")[2] or rule}:
            yield from (before + tail for before in ("", "a.", "www.x-1.", "z"))


@pytest.mark.parametrize("only_icann", [False, True])
def test_every_rule_of_the_list(only_icann):
    reference = publicsuffixlist.PublicSuffixList(only_icann=only_icann)
    psl = PublicSuffixList(only_icann=only_icann)
    rules = [rule for rule in sorted(reference._publicsuffix) if rule.isascii()]
    names = list(names_of(rules[:: 5 if only_icann else 1]))
    expected = [reference.publicsuffix(name) for name in names]
    assert suffixes(psl, names) == expected
    some = random.Random(0).sample(range(len(names)), 1000)
    assert [names[i][psl.suffix_start(names[i]) :] for i in some] == [expected[i] for i in some]
    assert [psl.split_suffix(names[i]) for i in some[:100]] == [expected[i] for i in some[:100]]


@pytest.mark.parametrize("only_icann", [False, True])
def test_rules_of_a_file(tmp_path, only_icann):
    (tmp_path / "list.dat").write_text(RULES, "utf-8")
    psl = PublicSuffixList(tmp_path / "list.dat", only_icann)
    reference = publicsuffixlist.PublicSuffixList(RULES, only_icann=only_icann)
    names = list(names_of(rule for rule in sorted(reference._publicsuffix) if rule.isascii()))
    names += ["unknown", "b.unknown", "a.b.unknown", "c.very.long.name.of.a.private.owner.com", "xcompute.com"]
    assert suffixes(psl, names) == [reference.publicsuffix(name) for name in names]
    again = PublicSuffixList(text="\n".join(psl.lines))
    assert again.rules == psl.rules and again.fingerprint == psl.fingerprint
    (tmp_path / "list.dat").write_text(RULES.replace("co.uk", "me.uk"), "utf-8")
    assert PublicSuffixList(tmp_path / "list.dat", only_icann).fingerprint != psl.fingerprint


def test_any_characters_have_an_answer():
    rng = random.Random(0)
    psl = PublicSuffixList(text="com\nco.uk\n*.ck\n!www.ck")
    names = ["".join(rng.choices("cokuw.?_\0", k=rng.randint(1, 9))) for _ in range(3000)]
    assert psl.suffix_starts(*joined(names)).tolist() == [psl.suffix_start(name) for name in names]
    assert len(psl.suffix_starts(*joined([]))) == 0


def test_a_tail_that_only_looks_like_a_rule_is_none(monkeypatch):
    """The filter and the hashes are a help to find rules; what decides is the bytes."""
    psl = PublicSuffixList(text="\n".join(f"{'x' * size}.com" for size in range(1, 40)) + "\nab.cd.com")
    names = [f"a.{'x' * size}.com" for size in range(1, 40)]
    names += [f"a.{'x' * (size - 1)}y.com" for size in range(2, 40)] + [f"a.y{'x' * size}.com" for size in range(1, 39)]
    names += ["q.ab.cd.com", "q.ac.cd.com", "q.abxcd.com"]
    expected = [name[psl.suffix_start(name) :] for name in names]
    monkeypatch.setattr(
        "torchrecipes.data.domains.suffix_table.hash_words", lambda words, starts, lengths: lengths.view(np.uint64)
    )
    monkeypatch.setattr(psl, "table", SuffixTable(psl.rules))
    psl.table.filter[:] = True
    monkeypatch.setattr(
        psl.table.slots, "find", lambda hashes: np.searchsorted(psl.table.lengths[:-1], hashes.view(np.int64)) % 41
    )
    found = suffixes(psl, names)
    # Not all rules are found this way, but none that is not there.
    assert all(one in (best, "com") for one, best in zip(found, expected, strict=True)) and found != ["com"] * len(
        names
    )


@pytest.mark.parametrize("content, code", [(None, "no_such_file"), ("// nothing\n", "no_rules")])
def test_a_file_without_rules_is_an_error(tmp_path, content, code):
    if content is not None:
        (tmp_path / "list.dat").write_text(content)
    with pytest.raises(UserError) as error:
        PublicSuffixList(tmp_path / "list.dat")
    assert (error.value.code, error.value.key) == (code, "public_suffix_list")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("only_icann", [False, True])
def test_real_names(only_icann):
    reference = publicsuffixlist.PublicSuffixList(only_icann=only_icann)
    lines = (SHARED / "top_domains.txt").read_bytes()
    lines += b"".join(
        line.rpartition(b",")[2] for line in (SHARED / "dga_vs_legit.csv").read_bytes().splitlines(True)[1:]
    )
    parsed = parse_lines(lines, psl=PublicSuffixList(only_icann=only_icann))
    names, wanted = parsed.names(), [line.decode() for line in lines.splitlines()]
    assert names == [wanted[line] for line in parsed.line_numbers.tolist()]
    split = [name[start:] for name, start in zip(names, parsed.suffix_starts.tolist(), strict=True)]
    assert split == [reference.publicsuffix(name) for name in names]
    rejected = [wanted[line] for line in parsed.rejected_lines.tolist()]
    assert len(names) + len(rejected) == len(wanted)
    assert all("_" in name or reference.publicsuffix(name) == name for name in rejected)
