"""Token types of domain names reach the model in fine-tuning and inference, in transformers and out of it."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.data.batching.memory_examples import MemoryExamples
from torchrecipes.data import LabeledCollator, MLMCollator, PairCollator
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.domains import domain_tokenizer, synthetic_names
from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.examples.example import Example
from torchrecipes.errors import UserError
from torchrecipes.evaluation import TextClassifier, TextEncoder, document_losses, fill_mask
from torchrecipes.models import (
    EmbeddingModel,
    SequenceClassifier,
    bert,
    check_tokenizer_compatibility,
    domain_bert,
    load_embedding_model,
    load_hf_weights,
    meta_classifier_from_hf,
    neobert,
    save_hf,
    write_model_card,
)

pytest.importorskip("publicsuffixlist")
SIZES = {"vocab_size": 43, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
NAMES = ["shop.example.com", "a.de", "www.example.co.uk", "x1-y2.net", "example.com"]
ODD = ["", " ", ".", "...", ".com", "com", "not a name!", "日本.jp", "a" * 90 + ".com", "EXAMPLE.COM", "a..b.com", "_x"]


@pytest.fixture(scope="module")
def tokenizer():
    return domain_tokenizer(synthetic_names(num_names=300, seed=1), num_suffixes=6)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained")
    model = domain_bert(**SIZES, num_suffixes=7, suffix_embedding_size=8, initializer_range=0.3, seed=2)
    save_hf(model, path, tokenizer)
    return path


def inputs_of(tokenizer, name, second=None):
    """The tokens and types of a name, or of two, one at a time."""
    encoder = ExampleEncoder(tokenizer, "labeled", ["text", "pair"][: 1 if second is None else 2], 64)
    found = encoder.encode([Example((name,) if second is None else (name, second))])
    types = tokenizer.token_type_ids(found.tokens, found.text_lengths, found.second_starts)
    return torch.from_numpy(found.tokens.astype(np.int64))[None], torch.from_numpy(types)[None]


def rows_of(tokenizer, names):
    tokens = [[inputs_of(tokenizer, name)[0][0].tolist() for name in example] for example in names]
    return ExampleRows(MemoryExamples(tokens, labels=np.zeros(len(names), int)), seq_len=64, pad_id=0)


@pytest.mark.parametrize("collator", [PairCollator, LabeledCollator])
def test_collators_pack_the_types_of_every_name(tokenizer, collator):
    names = [(name,) for name in NAMES] if collator is LabeledCollator else list(zip(NAMES, NAMES[::-1], strict=True))
    batch = collator(tokenizer).batch(rows_of(tokenizer, names), np.arange(5), np.zeros(5, np.uint64))
    ends = batch.cu_seqlens.tolist()
    for texts, example in zip(names, batch.examples.texts.tolist(), strict=True):
        for text, place in zip(texts, example, strict=True):
            ids, types = inputs_of(tokenizer, text)
            assert batch.input_ids[0, ends[place] : ends[place + 1]].tolist() == ids[0].tolist()
            assert batch.token_type_ids[0, ends[place] : ends[place + 1]].tolist() == types[0].tolist()
    padding = batch.token_type_ids[0, ends[batch.num_texts] :]
    assert len(padding) and not padding.any()
    assert batch.token_type_ids.max() >= 4
    assert collator(tokenizer).example_batch(2, 8).token_type_ids.shape == (len(names[0]) * 2, 8)


def test_embeddings_are_those_of_names_with_their_suffix(tokenizer, folder):
    model = load_embedding_model(folder, report=lambda line: None)
    found = TextEncoder(model, tokenizer, tokens_per_batch=64).encode(NAMES + ODD)
    for name, embedding in zip(NAMES, found, strict=False):
        ids, types = inputs_of(tokenizer, name)
        expected = model(ids, token_type_ids=types)[0].detach()
        assert np.abs(embedding - expected.numpy()).max() < 1e-5
    ids, _ = inputs_of(tokenizer, NAMES[0])
    assert (model(ids)[0] - torch.from_numpy(found[0])).abs().max() > 0.01  # the suffix matters
    assert np.isfinite(found).all()


def test_a_classifier_keeps_the_pooler_and_is_the_same_in_transformers(tokenizer, folder, tmp_path):
    model = meta_classifier_from_hf(folder, num_labels=3).to_empty(device="cpu").eval()
    coverage = load_hf_weights(model, folder, report=lambda line: None)
    assert coverage.initialized == ["head.out_proj.bias", "head.out_proj.weight"]
    model.head.out_proj.weight.data.normal_(std=0.5)
    found = TextClassifier(model, tokenizer, tokens_per_batch=64).logits(NAMES + ODD)
    pairs = TextClassifier(model, tokenizer).logits([(NAMES[0], NAMES[2])])
    save_hf(model, tmp_path, tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for name, logits in [*zip(NAMES, found, strict=False), (NAMES[::2][:2], pairs[0])]:
        ids, types = inputs_of(tokenizer, *([name] if isinstance(name, str) else name))
        expected = theirs(input_ids=ids, token_type_ids=types).logits[0].detach().numpy()
        assert np.abs(logits - expected).max() < 1e-5
    assert np.isnan(found[len(NAMES)]).all() and np.isfinite(found[: len(NAMES)]).all()


@pytest.mark.parametrize("name", ["exam[MASK]le.com", "example.[MASK]om", "[MASK][MASK].net"])
def test_masks_are_filled_with_the_suffix_that_is_there(tokenizer, name):
    model = domain_bert(**SIZES, num_suffixes=7, suffix_embedding_size=8, initializer_range=0.3, seed=2).eval()
    ids = torch.tensor([tokenizer.encode_prompt(name)])
    types = torch.from_numpy(tokenizer.token_type_ids(ids[0].numpy(), np.array([ids.shape[1]])))[None]
    suffix = name.rpartition(".")[2]
    expected = 0 if "[MASK]" in suffix else tokenizer.domain.suffixes.index(suffix) + 1
    assert (types // 4 == expected).all()
    logits = model.head(model(ids, token_type_ids=types))[ids == tokenizer.mask_id]
    for guesses, probability in zip(fill_mask(model, tokenizer, name, top_k=3), logits.softmax(-1), strict=True):
        best = probability.topk(3)
        assert [guess.token for guess in guesses] == [tokenizer.decode_token(i) for i in best.indices.tolist()]
        assert [guess.probability for guess in guesses] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_documents_are_scored_with_their_suffix(tokenizer):
    model, seen = domain_bert(**SIZES, num_suffixes=7), []
    model.register_forward_pre_hook(
        lambda _, ids, given: seen.append((*ids, given["token_type_ids"])), with_kwargs=True
    )
    ids = [tokenizer.encode_prompt(name) for name in NAMES]
    losses = list(document_losses(model, ids, collator=MLMCollator(tokenizer), tokenizer=tokenizer))
    assert all(loss.tokens for loss in losses)
    ((rows, types),) = seen
    assert (types >= 4).any()
    for row, of_row in zip(rows.numpy(), types.numpy(), strict=True):
        length = int(np.flatnonzero(row == tokenizer.sep_id)[0]) + 1
        assert of_row[:length].tolist() == tokenizer.token_type_ids(row[:length], np.array([length])).tolist()


def test_a_model_without_token_types_ignores_them(tokenizer):
    model = EmbeddingModel(neobert(**SIZES)).eval()
    ids, _ = inputs_of(tokenizer, NAMES[0])
    (found,) = TextEncoder(model, tokenizer).encode(NAMES[:1])
    assert np.abs(found - model(ids)[0].detach().numpy()).max() < 1e-5
    batch = PairCollator(tokenizer).batch(rows_of(tokenizer, [NAMES[:2]]), np.arange(1), np.zeros(1, np.uint64))
    assert batch.token_type_ids is not None and model.embed(batch).shape == (2, 32)
    fill_mask(neobert(**SIZES), tokenizer, "exam[MASK]le.com")


def test_a_tokenizer_of_more_suffixes_than_the_model_has_is_refused(tokenizer):
    sizes = SIZES | {"max_position_embeddings": 64}
    for model in (domain_bert(**sizes, num_suffixes=7), bert(**sizes, type_vocab_size=28)):
        check_tokenizer_compatibility(model, tokenizer, 64)
        check_tokenizer_compatibility(SequenceClassifier(model, num_labels=2), tokenizer, 64)
    for model in (domain_bert(**sizes, num_suffixes=6), bert(**sizes)):
        with pytest.raises(UserError) as error:
            check_tokenizer_compatibility(model, tokenizer, 64)
        assert (error.value.key, error.value.code) == ("model", "too_few_token_types")


def test_the_example_of_the_model_card_gives_the_states_of_names(tokenizer, folder, tmp_path, capsys):
    save_hf(load_embedding_model(folder, report=lambda line: None), tmp_path, tokenizer)
    card = write_model_card(tmp_path, name=str(tmp_path)).read_text()
    example = next(code for code in re.findall(r"```python\n(.*?)```", card, re.S) if "token_type_ids" in code)
    scope = {}
    exec(compile(example, "card", "exec"), scope)
    assert "[2, 17, 32]" in capsys.readouterr().out
    states = scope["model"](**scope["inputs"]).last_hidden_state
    ids, types = inputs_of(tokenizer, "example.co.uk")
    expected = load_embedding_model(folder, report=lambda line: None).encoder(ids, token_type_ids=types)
    assert (states[0, : ids.shape[1]] - expected[0]).abs().max() < 1e-5
