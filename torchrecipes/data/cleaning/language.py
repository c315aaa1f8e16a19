"""Language identification with `py3langid` (97 languages; Lui and Baldwin 2012, "langid.py"), the extra `clean`."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torchrecipes.config.metadata import Count, Fraction
from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.cleaning.removal import Removal
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class Language:
    """Removes documents in other languages.

    Args:
        keep: ISO 639-1 codes, such as `[en, de]`.
        min_probability: least probability of the language that was found; a document below it is removed.
        max_characters: characters of the beginning that are classified. None: all.

    Raises:
        UserError: `py3langid` is not installed (code `missing_package`), or does not know a language
            (`unknown_language`).
    """

    keep: tuple[str, ...] = ("en",)
    min_probability: Fraction = 0.0
    max_characters: Count | None = 1_000

    def check(self) -> list[UserError]:
        """Return what is wrong with `keep`."""
        try:
            known = _identifier().labels
        except UserError as error:
            return [error]
        return [
            UserError(
                f"py3langid has no language '{code}'",
                key="keep",
                hint=did_you_mean(code, known, "Its codes are"),
                code="unknown_language",
            )
            for code in self.keep
            if code not in known
        ]

    def __call__(self, text: str) -> str | Removal:
        """Return the text, or why it is removed."""
        language, probability = _identifier().classify(text[: self.max_characters])
        if language not in self.keep:
            return Removal("language.keep", f"{language}, probability {probability:.2f}")
        if probability < self.min_probability:
            return Removal("language.min_probability", f"{language}, probability {probability:.2f}")
        return text


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "the step `language` needs the package py3langid",
            hint="pip install 'torchrecipes[clean]'",
            code="missing_package",
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
