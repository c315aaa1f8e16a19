"""Late interaction: a vector for every token, in the folder of pylate."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrecipes.data import Examples, PairCollator
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.late_interaction import LateInteractionTexts, with_vectors
from torchrecipes.data.batching.texts import pack_texts
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.sources import Document
from torchrecipes.data.tokenizers import load_tokenizer, train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.evaluation import Retrieval, TextEncoder, max_sim_scores
from torchrecipes.losses import InfoNCE
from torchrecipes.models import EmbeddingModel, LateInteraction, bert, load_embedding_model, save_hf

DOCUMENTS = ["The cat sat on the mat.", "A dog!", "It was raining all day long, and nobody went out to the sea."]
DOCUMENTS += ["Two birds in a tree sang of the spring; a boat came back from the sea with fish for the town."]
QUERIES = ["where is the cat", "who sang of the spring in the tree, and who came back from the sea with fish", "rain?"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document(" ".join(DOCUMENTS + QUERIES) * 3, "here")], vocab_size=150)


def settings(**changes):
    options = {"query_length": 12, "document_length": 20, "query_marker": "the", "document_marker": "sea", "size": 8}
    return LateInteraction(**options | changes)


def build(tokenizer, late):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    encoder = bert(vocab_size=tokenizer.vocab_size, **sizes, max_position_embeddings=60, initializer_range=0.2, seed=2)
    return EmbeddingModel(encoder, late_interaction=late, max_length=40).eval()


def test_queries_are_cut_marked_and_expanded_and_documents_skip_punctuation(tokenizer):
    late = LateInteractionTexts(tokenizer, settings(query_length=6, document_length=5, skip=".!"))
    vocabulary = tokenizer.backend.get_vocab()
    cls, sep, mask = tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id
    cat, dog, stop, query, document = (vocabulary[token] for token in ("cat", "dog", ".", "the", "sea"))
    texts = [[cls, cat, sep], [cls, cat, dog, cat, dog, cat, sep], [cls, cat, stop, sep], [cls, cat, dog, cat, sep]]
    tokens, lengths, kept = late.arrange(
        np.concatenate(texts), np.array([len(text) for text in texts]), np.array([True, True, False, False])
    )
    found = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert found == [
        [cls, query, cat, sep, mask, mask],
        [cls, query, cat, dog, cat, sep],
        [cls, document, cat, stop, sep],
        [cls, document, cat, dog, sep],
    ]
    assert kept.tolist() == [True] * 12 + [True, True, True, False, True] + [True] * 5


def test_a_vector_is_the_normalized_projection_of_its_token(tokenizer):
    model = build(tokenizer, settings())
    ids = tokenizer.encode_batch(DOCUMENTS)
    lengths = np.array([len(text) for text in ids])
    kept = np.concatenate([np.arange(len(text)) % 3 != 1 for text in ids])
    fields, places = pack_texts(np.concatenate(ids), lengths, tokenizer.pad_id)
    batch = with_vectors(Batch(num_targets=4, **fields), lengths, kept)
    with torch.no_grad():
        vectors, expected = model.embed(batch), []
        for place in np.argsort(places):
            hidden = model.encoder(torch.tensor([ids[place]]))[0]
            projected = torch.nn.functional.normalize(model.projection(hidden), dim=-1)
            expected.append(projected[np.arange(len(projected)) % 3 != 1])
    torch.testing.assert_close(vectors, torch.cat(expected), atol=1e-5, rtol=1e-5)


class Rows:
    source_names = ()

    def __init__(self, block):
        self.block = block

    def examples(self, numbers):
        return self.block


def test_pairs_are_batched_and_trained(tokenizer):
    model, late = build(tokenizer, settings()), settings()
    ids = tokenizer.encode_batch([QUERIES[0], DOCUMENTS[0], QUERIES[1], DOCUMENTS[3]])
    lengths = np.array([len(text) for text in ids])
    texts = np.array([[0, 1], [2, 3]])
    zeros = np.zeros(4, np.int64)
    block = ExampleBlock(np.concatenate(ids), lengths, lengths, np.arange(4), zeros, texts)
    batch = PairCollator(tokenizer, late_interaction=late).batch(Rows(block), np.arange(2), np.arange(2))
    examples = batch.examples
    assert batch.num_texts == 4 and isinstance(examples, Examples)
    assert examples.lengths[examples.texts[:, 0]].tolist() == [12, 12]
    vectors = model.embed(batch)
    assert len(vectors) == examples.lengths.sum()
    loss, _ = InfoNCE(temperature=1.0)(vectors, examples)
    encode = TextEncoder(model, tokenizer)
    queries = encode.encode([QUERIES[0], QUERIES[1]], prompt="query")
    passages = encode.encode([DOCUMENTS[0], DOCUMENTS[3]], prompt="passage")
    scores = max_sim_scores(queries, passages)
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(2), reduction="sum")
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert model.projection.weight.grad.abs().max() > 0
    made_up = PairCollator(tokenizer, late_interaction=late).example_batch(2, 10)
    assert InfoNCE()(model.embed(made_up), made_up.examples)[0].isfinite()


def test_encoding_does_not_depend_on_batches(tokenizer):
    model = build(tokenizer, settings())
    together = TextEncoder(model, tokenizer).encode(DOCUMENTS, prompt="passage")
    alone = TextEncoder(model, tokenizer, tokens_per_batch=1).encode(DOCUMENTS, prompt="passage")
    assert together.lengths.tolist() == alone.lengths.tolist()
    np.testing.assert_allclose(together.vectors, alone.vectors, atol=1e-5)
    assert len(TextEncoder(model, tokenizer).encode([], prompt="query")) == 0
    assert together[1:3].lengths.tolist() == together.lengths[1:3].tolist()
    np.testing.assert_array_equal(
        together[1:3].vectors, together.vectors[together.lengths[0] :][: sum(alone.lengths[1:3])]
    )


class Example:
    def __init__(self, *texts):
        self.texts, self.source = texts, "here:1"


def test_retrieval_searches_by_max_sim(tokenizer):
    encode = TextEncoder(build(tokenizer, settings()), tokenizer)
    data = [Example(query, document) for query, document in zip(QUERIES, DOCUMENTS, strict=False)]
    data += [Example("a", DOCUMENTS[3])]
    queries = [*QUERIES, "a"]
    scores = max_sim_scores(encode.encode(queries, prompt="query"), encode.encode(DOCUMENTS, prompt="passage"))
    ranks = 1 + (scores > scores.diag()[:, None]).sum(1)
    results = Retrieval(data=data)(encode)
    assert results["mrr@10"] == pytest.approx((1 / ranks).mean().item())
    with pytest.raises(UserError) as error:
        Retrieval(data=data)(encode, [4])
    assert error.value.code == "several_vectors"


def test_folders_keep_the_settings(tokenizer, tmp_path):
    model = build(tokenizer, settings(skip=".,", expand_queries=False))
    save_hf(model, tmp_path, tokenizer)
    loaded = load_embedding_model(tmp_path, report=lambda _: None)
    assert loaded.late_interaction == model.late_interaction and loaded.max_length == 40
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name])
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps(config | {"do_query_expansion": True, "attend_to_expansion_tokens": False}))
    with pytest.raises(UserError) as error:
        load_embedding_model(tmp_path)
    assert [problem.key for problem in error.value.problems] == ["attend_to_expansion_tokens"]


def test_wrong_settings(tokenizer):
    with pytest.raises(UserError) as error:
        LateInteractionTexts(tokenizer, settings(document_marker="[nothing]"))
    assert error.value.code == "unknown_token"
    assert error.value.key == "embedding.late_interaction.document_marker"
    with pytest.raises(UserError) as error:
        build(tokenizer, settings(document_length=61))
    assert error.value.key == "late_interaction" and error.value.code == "out_of_range"
    encode = TextEncoder(build(tokenizer, settings()), tokenizer)
    with pytest.raises(UserError) as error:
        encode.encode(DOCUMENTS)
    assert error.value.code == "unknown_prompt"
    with pytest.raises(UserError) as error:
        next(encode.encode_iter(DOCUMENTS))
    assert error.value.code == "several_vectors"


PYLATE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pylate import models, scores
folder, queries, documents = sys.argv[1], *map(json.loads, sys.argv[2:4])
model = models.ColBERT(folder, device="cpu")
q = model.encode(queries, is_query=True, convert_to_numpy=True, show_progress_bar=False)
d = model.encode(documents, is_query=False, convert_to_numpy=True, show_progress_bar=False)
rows = [[float((a @ b.T).max(1).sum()) for b in d] for a in q]
print(json.dumps({"scores": rows, "lengths": [[len(x) for x in side] for side in (q, d)]}))
"""


@pytest.mark.parametrize("expand", [True, False])
def test_pylate_gives_equal_scores(tokenizer, tmp_path, expand):
    """Where a Python with pylate is named by the variable PYLATE_PYTHON, which may be one of another environment."""
    python = os.environ.get("PYLATE_PYTHON")
    if not python:
        pytest.skip("needs PYLATE_PYTHON")
    model = build(tokenizer, settings(expand_queries=expand))
    save_hf(model, tmp_path, tokenizer)
    arguments = [str(tmp_path), json.dumps(QUERIES), json.dumps(DOCUMENTS)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([python, "-c", PYLATE, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    encode = TextEncoder(load_embedding_model(tmp_path), load_tokenizer(Path(tmp_path)))
    queries, documents = encode.encode(QUERIES, prompt="query"), encode.encode(DOCUMENTS, prompt="passage")
    assert [queries.lengths.tolist(), documents.lengths.tolist()] == theirs["lengths"]
    np.testing.assert_allclose(max_sim_scores(queries, documents).numpy(), theirs["scores"], atol=1e-4)
