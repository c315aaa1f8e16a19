from functools import cache

import numpy as np
import pytest
import torch

from tests import ranks
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources import Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.errors import UserError
from torchrecipes.evaluation import TextEncoder, over_texts
from torchrecipes.models import EmbeddingModel, bert

WORDS = "the cat sat on a mat and saw two birds in an old tree by the sea".split()
PROMPTS = {"query": "the sea: ", "title": "a "}


def texts_of(count, longest=30):
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, size=draw.integers(0, longest))) for _ in range(count)]


@cache
def tokenizer():
    return train_wordpiece([Document(" ".join(WORDS) * 3, "here")], vocab_size=80)


def model_of(**settings):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = bert(vocab_size=tokenizer().vocab_size, **sizes, max_position_embeddings=64, initializer_range=0.3)
    return EmbeddingModel(encoder, prompts=PROMPTS, **settings)


def one_by_one(model, texts, prompt="", max_length=64):
    """Each text by itself, as one row."""
    rows = []
    text_start = len(tokenizer().encode(prompt)) - 1
    for text in texts:
        ids = tokenizer().encode(prompt + text)
        ids = [*ids[: max_length - 1], ids[-1]] if len(ids) > max_length else ids
        skipped = 0 if model.include_prompt or not prompt else min(text_start, len(ids) - 1)
        model.eval()
        with torch.no_grad():
            rows.append(model(torch.tensor([ids]), pool_from=torch.tensor([skipped]))[0].numpy())
    return np.array(rows)


@pytest.mark.parametrize("settings", [{}, {"include_prompt": False, "pooling": "max", "projection": 5}])
@pytest.mark.parametrize(("prompt", "tokens"), [("", 4096), ("query", 100), ("title", 1), ("passage", 64)])
def test_embeddings_are_those_of_each_text_alone_and_in_order(settings, prompt, tokens):
    model, texts = model_of(**settings), texts_of(50)
    model.train()
    encoder = TextEncoder(model, tokenizer(), max_length=40, tokens_per_batch=tokens)
    found = encoder.encode(texts, prompt)
    assert model.training and found.dtype == np.float32
    assert np.abs(found - one_by_one(model, texts, PROMPTS.get(prompt, ""), 40)).max() <= 1e-5


def test_texts_in_one_packed_row_have_the_same_embeddings():
    model, texts = model_of(include_prompt=False), texts_of(20)
    encoder = TextEncoder(model.eval(), tokenizer(), tokens_per_batch=1024)
    window = encoder._tokenize(encoder._encoder(PROMPTS["query"]), texts)
    batches = over_texts.TextBatches(encoder.tokenizer.pad_id, 1024, torch.device("cpu"))
    for places in batches.split(window.lengths, True):
        batch, _ = batches.packed(window, places)
        assert batch.input_ids.shape[0] == 1 and batch.input_ids.shape[1] in (64, 128, 256, 512, 1024)
        with torch.no_grad():
            found = model.embed(batch).numpy()
        assert np.abs(found - one_by_one(model, [texts[i] for i in places], PROMPTS["query"])).max() <= 1e-5


def test_a_generator_is_read_window_by_window(monkeypatch):
    monkeypatch.setattr(over_texts, "TEXTS_PER_WINDOW", 7)
    texts, read = texts_of(40), []
    source = (read.append(text) or text for text in texts)
    encoder = TextEncoder(model_of(), tokenizer())
    for number, part in enumerate(encoder.encode_iter(source), start=1):
        assert len(part) == min(7, 40 - 7 * (number - 1)) and len(read) == min(7 * (number + 1), 40)
    everything = np.concatenate(list(encoder.encode_iter(iter(texts))))
    assert np.array_equal(everything, encoder.encode(texts))
    assert encoder.encode([]).shape == (0, 16)


def test_what_is_cut_or_empty_is_counted():
    encoder = TextEncoder(model_of(), tokenizer(), max_length=12)
    texts = ["the cat", "", " \n", " ".join(["cat"] * 10), " ".join(["cat"] * 11), " ".join(["sea"] * 500)]
    progress = Progress("embedding")
    found = encoder.encode(texts, progress=progress)
    assert (encoder.num_truncated, encoder.num_empty) == (2, 2)
    assert np.isfinite(found).all() and np.array_equal(found[1], found[2])
    assert np.allclose(found[3], found[4], atol=1e-6)
    assert progress.documents == 6 and progress.bytes == sum(map(len, texts)) and progress.tokens == 4 + 2 + 2 + 36


def test_the_default_prompt_is_used_where_none_is_named():
    model = model_of(default_prompt="query")
    encoder = TextEncoder(model, tokenizer())
    texts = texts_of(4)
    assert np.array_equal(encoder.encode(texts, None), encoder.encode(texts, "query"))
    assert not np.allclose(encoder.encode(texts, ""), encoder.encode(texts, "query"))
    with pytest.raises(UserError) as error:
        encoder.encode(texts, "document of mine")
    assert error.value.code == "unknown_prompt"
    with pytest.raises(UserError) as error:
        TextEncoder(model, tokenizer(), max_length=65)
    assert (error.value.key, error.value.code) == ("max_length", "out_of_range")


def on_ranks():
    with torch.device("meta"):
        model = model_of()
    parallelize(model, "fsdp", torch.device("cpu"), torch.float32)
    init_on_device(model, torch.device("cpu"), 0)
    encoder = TextEncoder(model, tokenizer(), tokens_per_batch=100)
    return [encoder.encode(texts_of(count)).tolist() for count in (3, 21)]


def test_ranks_share_the_texts_of_a_sharded_model():
    encoder = TextEncoder(model_of(), tokenizer(), tokens_per_batch=100)
    for results in ranks.call(on_ranks):
        for found, count in zip(results, (3, 21), strict=True):
            assert np.abs(np.array(found) - encoder.encode(texts_of(count))).max() <= 1e-5


def test_autocast_changes_little():
    model, texts = model_of(), texts_of(20)
    plain = TextEncoder(model, tokenizer()).encode(texts)
    half = TextEncoder(model, tokenizer(), autocast=lambda: torch.autocast("cpu", torch.bfloat16)).encode(texts)
    assert half.dtype == np.float32 and not np.array_equal(plain, half)
    assert (plain * half).sum(1).min() > 0.99


@pytest.mark.gpu
def test_a_gpu_packs_texts_without_padding():
    model, texts = model_of(), texts_of(200)
    expected = TextEncoder(model, tokenizer()).encode(texts)
    model.cuda()
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        on = dtype == torch.bfloat16
        encoder = TextEncoder(model, tokenizer(), autocast=lambda on=on: torch.autocast("cuda", torch.bfloat16, on))
        assert np.abs(encoder.encode(texts) - expected).max() <= limit
