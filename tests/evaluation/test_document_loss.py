"""The loss of every document."""

import numpy as np
import pytest
import torch
import xxhash

from torchrecipes.data.batching import MLMCollator
from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers import train_bpe
from torchrecipes.errors import UserError
from torchrecipes.evaluation import document_losses
from torchrecipes.models import llama, neobert

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DRAW = np.random.default_rng(0)
DOCUMENTS = [DRAW.integers(5, 250, size).tolist() for size in (5, 40, 3, 100, 17, 2, 33, 64)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([Document("abc", "here")], vocab_size=280)


def make(family, tokenizer):
    return family(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=32, initializer_range=0.3, seed=1, **SIZES
    ).double()


def logits(model, ids):
    return model.head(model(torch.tensor([ids]), position_ids=torch.arange(len(ids))[None]))[0]


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_a_causal_model_predicts_every_token_of_a_piece_from_those_before_it(tokenizer, batch_tokens):
    model = make(llama, tokenizer)
    found = list(document_losses(model, iter(DOCUMENTS), batch_tokens=batch_tokens))
    for document, (total, tokens) in zip(DOCUMENTS, found, strict=True):
        expected = 0.0
        for start in range(0, len(document) - 1, 32):
            piece = document[start : start + 33]
            with torch.no_grad():
                log_p = logits(model, piece[:-1]).log_softmax(-1)
            expected -= log_p[torch.arange(len(piece) - 1), piece[1:]].sum().item()
        assert tokens == len(document) - 1
        assert total == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_a_masked_model_predicts_what_its_seed_and_the_document_choose(tokenizer, batch_tokens):
    model, collator = make(neobert, tokenizer), MLMCollator(tokenizer, 0.3)
    found = list(document_losses(model, iter(DOCUMENTS), collator=collator, seed=3, batch_tokens=batch_tokens))
    for document, (total, tokens) in zip(DOCUMENTS, found, strict=True):
        content = xxhash.xxh3_64_intdigest(np.array(document, np.int64).tobytes()) >> 1
        expected = count = 0
        for number, start in enumerate(range(0, len(document), 32)):
            piece = np.array([document[start : start + 32]])
            _, labels, _ = hidden = collator(piece, fold_in(3, content, number))
            with torch.no_grad():
                log_p = logits(model, piece[0].tolist()).log_softmax(-1)
            for position, label in zip(hidden[0].tolist(), labels.tolist(), strict=True):
                if label >= 0:
                    expected -= log_p[position, label].item()
                    count += 1
        assert tokens == count > 0
        assert total == pytest.approx(expected, rel=1e-9)


def test_order_and_neighbours_do_not_matter(tokenizer):
    model, collator = make(neobert, tokenizer), MLMCollator(tokenizer, 0.3)
    once = list(document_losses(model, DOCUMENTS, collator=collator))
    again = list(document_losses(model, DOCUMENTS[::-1], collator=collator, batch_tokens=64))[::-1]
    assert [total for total, _ in once] == pytest.approx([total for total, _ in again], rel=1e-9)
    other = list(document_losses(model, DOCUMENTS, collator=collator, seed=1))
    assert [total for total, _ in once] != [total for total, _ in other]


def test_documents_without_a_token_to_predict(tokenizer):
    assert list(document_losses(make(llama, tokenizer), [[5], [5, 6], []])) == [
        (0, 0),
        (pytest.approx(5.6, abs=5), 1),
        (0, 0),
    ]
    specials = [[tokenizer.cls_id, tokenizer.sep_id], []]
    assert list(document_losses(make(neobert, tokenizer), specials, collator=MLMCollator(tokenizer))) == [(0, 0)] * 2
    assert list(document_losses(make(llama, tokenizer), [])) == []


def test_it_leaves_modes_and_generators_alone(tokenizer):
    model = make(llama, tokenizer).train()
    state = torch.random.get_rng_state()
    list(document_losses(model, DOCUMENTS))
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_wrong_input(tokenizer):
    model = make(llama, tokenizer)
    for options, documents, code in (
        ({"window": 33}, DOCUMENTS, "out_of_range"),
        ({}, [[1, tokenizer.vocab_size]], "id_out_of_range"),
    ):
        with pytest.raises(UserError) as caught:
            list(document_losses(model, documents, **options))
        assert caught.value.code == code
