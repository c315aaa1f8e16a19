"""`domain_tokenizer`: 43 tokens, and the most frequent public suffixes of the names that a model will see."""

import json
from collections import Counter
from pathlib import Path

import tokenizers
import xxhash
from tokenizers import decoders, models, normalizers

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.domains.encoding import SPECIAL, VOCABULARY, DomainEncoding
from torchrecipes.data.progress import Progress
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
        public_suffix_list: a file of rules in the format of publicsuffix.org. None: those of the package
            `publicsuffixlist`.
        only_icann: the rules of registries alone, without those of private domains such as `blogspot.com`.

    Raises:
        UserError: no names (code `no_documents`); `causal`; `folder` holds another tokenizer (`other_tokenizer`) or
            cannot be written.
    """
    if causal:
        hint = "Use it for masked language modeling, or train_char for a model that predicts the next character."
        raise UserError(
            "domain_tokenizer is not for a causal model", key="causal", hint=hint, code="unsupported_tokenizer"
        )
    if not 1 <= num_suffixes <= 1 << 15:
        problem, hint = f"{num_suffixes} is out of range", "Set 1 to 32768."
        raise UserError(problem, key="num_suffixes", hint=hint, code="invalid_value")
    rules = _rules(public_suffix_list, only_icann)
    settings = {"type": "domain", "num_suffixes": num_suffixes, "source": source.fingerprint}
    settings["rules"] = xxhash.xxh3_128_hexdigest("\n".join(rules).encode())
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
    tokenizer = _characters().with_domain(DomainEncoding(_frequent_suffixes(source, rules, num_suffixes), rules))
    if record is not None:
        tokenizer.save(record.parent)
        write_atomically(record, [(json.dumps(settings, indent=2) + "\n").encode()])  # last: the tokenizer is complete
    return tokenizer


def _characters() -> Tokenizer:
    vocabulary = {name: i for i, name in enumerate(VOCABULARY)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))  # without merges: characters
    backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([special_token(name) for name in SPECIAL])
    backend.post_processor = between(backend, "[CLS]", "[SEP]")
    roles = {role: special_token(USUAL_NAMES[role][0]) for role in ("pad", "unk", "cls", "sep", "mask")}
    return make_tokenizer(backend, roles, pad_vocab_to_multiple_of=1)


def _rules(path: str | Path | None, only_icann: bool) -> list[str]:
    from publicsuffixlist import PublicSuffixList

    content = None if path is None else Path(path).read_text("utf-8")
    found = PublicSuffixList(content, only_icann=only_icann)._publicsuffix
    return sorted(rule for rule in found if rule.isascii())


def _frequent_suffixes(source: Source, rules: list[str], count: int) -> list[str]:
    from publicsuffixlist import PublicSuffixList

    suffixes, counts = PublicSuffixList("\n".join(rules), accept_encoded_idn=False), Counter()
    progress = Progress("counting suffixes", source.num_bytes, "names")
    try:
        for document in source:
            counts[suffixes.publicsuffix(document.text) or ""] += 1
            progress.add(1, len(document.text) + 1)
    finally:
        progress.close()
    require_documents(source, source.report)
    del counts[""]
    return sorted(counts, key=lambda suffix: (-counts[suffix], suffix))[:count]
