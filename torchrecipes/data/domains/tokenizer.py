"""`domain_tokenizer`: 43 tokens, and the most frequent public suffixes of the names that a model will see."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.domains.encoding import SPECIAL, VOCABULARY, DomainEncoding
from torchrecipes.data.domains.public_suffix_list import PublicSuffixList
from torchrecipes.data.domains.suffix_counts import count_suffixes
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.mixed_sources import Mixture
from torchrecipes.data.sources.records import Source, require_documents
from torchrecipes.data.tokenizers.load import load_tokenizer
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, make_tokenizer
from torchrecipes.data.tokenizers.tokenizer_files import USUAL_NAMES, between, special_token
from torchrecipes.errors import UserError


def domain_tokenizer(
    source: Source,
    folder: str | Path | None = None,
    causal: bool = False,
    num_suffixes: int = 512,
    public_suffix_list: str | Path | None = None,
    only_icann: bool = False,
) -> Tokenizer:
    """Makes the tokenizer of domain names, or loads the one in `folder`.

    Its tokens are always the same 43 (see `DomainEncoding`), without vocabulary padding. What is counted in the source
    is how often every public suffix occurs: the most frequent ones get ids, equally frequent ones in alphabetical
    order.

    Args:
        source: the names.
        folder: where the tokenizer is saved; one that is there is loaded if it came from the same source and settings.
            None: not saved.
        causal: must be False: a name has no order in which its characters are predicted.
        num_suffixes: suffixes that get an id; fewer where the source has fewer. Id 0 is that of all others.
        public_suffix_list: a file of rules in the format of publicsuffix.org. None: the rules of the source, or where
            it has none those of the package `publicsuffixlist`.
        only_icann: the rules of registries alone, without those of private domains such as `blogspot.com`.

    Raises:
        UserError: no names (code `no_documents`); `causal`; `folder` holds another tokenizer (`other_tokenizer`) or
            cannot be written; the source has other rules (`other_suffix_list`).
    """
    if causal:
        hint = "Use it for masked language modeling, or train_char for a model that predicts the next character."
        raise UserError(
            "domain_tokenizer is not for a causal model", key="causal", hint=hint, code="unsupported_tokenizer"
        )
    if not 1 <= num_suffixes <= 1 << 15:
        problem, hint = f"{num_suffixes} is out of range", "Set 1 to 32768."
        raise UserError(problem, key="num_suffixes", hint=hint, code="invalid_value")
    sources = list(source.sources.values()) if isinstance(source, Mixture) else [source]
    suffix_list = _suffix_list(sources, public_suffix_list, only_icann)
    settings = {"type": "domain", "num_suffixes": num_suffixes, "source": source.fingerprint}
    settings["rules"] = suffix_list.fingerprint
    record = Path(folder) / "training.json" if folder is not None else None
    if record is not None and record.exists():
        saved = json.loads(record.read_text("utf-8"))
        if differ := [key for key, value in settings.items() if saved.get(key) != value]:
            raise UserError(
                f"the tokenizer in {folder} was made with {'; '.join(f'{key}={saved.get(key)!r}' for key in differ)}",
                hint="Use another output_dir or data.corpus_dir, or delete that folder and the corpus made with it.",
                code="other_tokenizer",
            )
        return load_tokenizer(record.parent)
    if folder is not None:
        check_writable(folder)
    suffixes = _frequent_suffixes(sources, suffix_list, num_suffixes)
    tokenizer = _characters().with_domain(DomainEncoding(suffixes, suffix_list))
    if record is not None:
        tokenizer.save(record.parent)
        write_atomically(record, [(json.dumps(settings, indent=2) + "\n").encode()])  # last: the tokenizer is complete
    return tokenizer


def _stand_in(num_suffixes: int = 512, **_: Any) -> Tokenizer:
    """A tokenizer of the same sizes with made-up suffixes, for estimates before the names are read."""
    suffixes = [f"suffix{number}" for number in range(num_suffixes)]
    return _characters().with_domain(DomainEncoding(suffixes, PublicSuffixList(text="com")))


domain_tokenizer.stand_in = _stand_in


def _characters() -> Tokenizer:
    vocabulary = {name: i for i, name in enumerate(VOCABULARY)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))  # without merges: characters
    backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([special_token(name) for name in SPECIAL])
    backend.post_processor = between(backend, "[CLS]", "[SEP]")
    roles = {role: special_token(USUAL_NAMES[role][0]) for role in ("pad", "unk", "cls", "sep", "mask")}
    return make_tokenizer(backend, roles, pad_vocab_to_multiple_of=1)


def _suffix_list(sources: list[Source], path: str | Path | None, only_icann: bool) -> PublicSuffixList:
    """The rules that are asked for; those of the sources where none are.

    Raises:
        UserError: a source splits its names by other rules (code `other_suffix_list`).
    """
    own = [source.suffixes for source in sources if hasattr(source, "suffixes")]
    chosen = own[0] if own and path is None and not only_icann else PublicSuffixList(path, only_icann)
    if any(one.fingerprint != chosen.fingerprint for one in own):
        raise UserError(
            "the sources of names and the tokenizer have different rules for public suffixes",
            key="public_suffix_list",
            hint="Give all sources the same public_suffix_list and only_icann, and leave them out here.",
            code="other_suffix_list",
        )
    return chosen


def _frequent_suffixes(sources: list[Source], suffix_list: PublicSuffixList, count: int) -> list[str]:
    counts: Counter[str] = Counter()
    for source in sources:
        if hasattr(source, "blocks"):
            found = count_suffixes(source)
            counts.update(dict(zip(found.suffixes, found.counts.tolist(), strict=True)))
            continue
        progress = Progress("counting suffixes", source.num_bytes, "names")
        try:
            for document in source:
                name = document.text.lower()
                counts[name[suffix_list.suffix_start(name) :]] += 1
                progress.add(1, len(name) + 1)
        finally:
            progress.close()
        require_documents(source, source.report)
    return sorted(counts, key=lambda suffix: (-counts[suffix], suffix))[:count]
