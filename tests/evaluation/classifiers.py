"""A small classifier with a tokenizer of words, for tests."""

import json

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.models import SequenceClassifier, bert, save_hf

WORDS = "the a cat dog sea sat ran swam on in under mat sun rain big old red and or not".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(folder):
    """Loaded from `folder`, into which it is written."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(exist_ok=True, parents=True)
    backend.save(str(folder / "tokenizer.json"))
    roles = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder, pad_vocab_to_multiple_of=1)


def saved_classifier(folder, builder=bert, *, calibration=None, **options):
    """A folder of a classifier with random weights, large enough that texts differ."""
    tokenizer = word_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    encoder = builder(vocab_size=tokenizer.vocab_size, initializer_range=0.3, max_position_embeddings=32, **sizes)
    model = SequenceClassifier(encoder, **({"label_names": ["bad", "fair", "good"]} | options))
    if calibration:
        model.calibrate(**calibration)
    save_hf(model, folder, tokenizer)
    return model.eval()


def texts_of(count, longest=20, seed=0):
    """Texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]
