"""`CleaningSteps`: which steps clean a text, and their options; `read_steps` reads them from words and YAML files.

The order is fixed. Steps that change a text come first, so that the others judge what remains; a text from which
boilerplate is removed passes the steps before it again. So a cleaned corpus passes the same steps unchanged.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from torchrecipes.config.check import check_config
from torchrecipes.config.merge import MergedConfig, Problems
from torchrecipes.config.metadata import Range
from torchrecipes.config.read_yaml import add_file, add_overrides
from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.cleaning.boilerplate import BoilerplateLines
from torchrecipes.data.cleaning.c4 import C4
from torchrecipes.data.cleaning.gopher import GopherQuality, GopherRepetition
from torchrecipes.data.cleaning.language import Language
from torchrecipes.data.cleaning.normalization import Normalize
from torchrecipes.data.cleaning.removal import Removal
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class ExactDuplicates:
    """Removes a document whose text, but for white space, an earlier one has: xxh3-128 hashes are compared."""


@dataclass(frozen=True)
class NearDuplicates:
    """Removes a document that is similar to an earlier one: see `torchrecipes.data.cleaning.signatures`.

    Args:
        jaccard: least share of equal positions of two signatures: the estimated Jaccard similarity of word 5-grams.
    """

    jaccard: Annotated[float, Range(0.5, 1)] = 0.8


@dataclass
class CleaningSteps:
    """The steps of a cleaning, in their order. None: the step is left out.

    Args:
        normalize: Unicode normal form, control and zero-width characters.
        c4: C4's filter.
        boilerplate_lines: lines that recur in many documents.
        gopher_quality: Gopher's quality filter.
        gopher_repetition: Gopher's repetition filter.
        language: language identification.
        exact_duplicates: documents that are there twice.
        near_duplicates: documents that are nearly there twice.
        exempt: patterns (`*`, `?`, `[]`) of sources, such as `*.py`, whose documents are only normalized and compared
            for duplicates: the other steps are made for prose. `src/a.py:1` is compared with and without its `:1`.
    """

    normalize: Normalize | None = None
    c4: C4 | None = None
    boilerplate_lines: BoilerplateLines | None = None
    gopher_quality: GopherQuality | None = None
    gopher_repetition: GopherRepetition | None = None
    language: Language | None = None
    exact_duplicates: ExactDuplicates | None = None
    near_duplicates: NearDuplicates | None = None
    exempt: tuple[str, ...] = ()

    @property
    def removes_duplicates(self) -> bool:
        """Whether documents are compared with each other."""
        return self.exact_duplicates is not None or self.near_duplicates is not None

    def names(self) -> list[str]:
        """Return the names of the steps that are on, in their order."""
        return [name for name in STEPS if getattr(self, name) is not None]

    def is_exempt(self, source: str) -> bool:
        """Whether the document from `source` is only normalized and compared for duplicates."""
        name = source.rsplit(":", 1)[0]
        return any(fnmatchcase(source, pattern) or fnmatchcase(name, pattern) for pattern in self.exempt)

    def apply(
        self, text: str, source: str, boilerplate: frozenset[int] | None = None
    ) -> Iterator[tuple[str, str | Removal]]:
        """Yield the name of every step that changed or removed the text, and what it returned; the last one counts.

        Args:
            text: a document.
            source: its source.
            boilerplate: hashes of lines; None: end before the boilerplate is removed.
        """
        before, after = ["normalize", "c4"], ["gopher_quality", "gopher_repetition", "language"]
        if self.is_exempt(source):
            names = ["normalize"]
        elif boilerplate is None:
            names = before
        else:
            names = [*before, "boilerplate_lines", *after]
        while names:
            name, *names = names
            step = getattr(self, name)
            if step is None:
                continue
            result = step.remove(text, boilerplate)[0] if name == "boilerplate_lines" else step(text)
            if result != text:
                yield name, result
                if name == "boilerplate_lines":
                    names = [*before, *names]
            if isinstance(result, Removal):
                return
            text = result


STEPS = {field.name: field for field in dataclasses.fields(CleaningSteps) if field.name != "exempt"}
DEFAULT_STEPS = ("normalize", "exact_duplicates", "near_duplicates")


def read_steps(words: Sequence[str] = DEFAULT_STEPS) -> CleaningSteps:
    """Return the steps that `words` ask for.

    Args:
        words: names of steps (`c4`), options (`c4.min_sentences=5`; of a step that is off, they switch it on), and YAML
            files with options by step (`c4: {min_sentences: 5}`, `normalize: {}`). Later words override earlier ones.

    Raises:
        UserError: no such step (code `unknown_step`), no such file, or an invalid option (`invalid_config`).
    """
    merged, problems = MergedConfig({}), Problems()
    for word in words:
        if "=" in word:
            step = word.partition("=")[0].partition(".")[0]
            if step != "exempt":
                _require_step(step)
                merged.tree.setdefault(step, {})
            add_overrides(merged, [word], problems)
        elif word.endswith((".yaml", ".yml")):
            add_file(merged, Path(word), problems)
        else:
            _require_step(word)
            merged.tree.setdefault(word, {})
    for step, options in list(merged.tree.items()):
        if step != "exempt":
            _require_step(step)
        if options is None:
            del merged.tree[step]
    steps = check_config(merged, CleaningSteps, problems)
    problems.raise_all("the steps")
    return steps


def _require_step(name: str) -> None:
    if name not in STEPS:
        hint = did_you_mean(name, STEPS, "The steps are")
        raise UserError(f"there is no step '{name}'", key="--steps", hint=hint, code="unknown_step")
