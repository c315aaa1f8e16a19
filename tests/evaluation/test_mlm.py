import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecipes.data.batching.batch import Batch, document_fields
from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers import train_char, train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.evaluation.characters import KINDS, character_kinds
from torchrecipes.evaluation.mlm import UnigramBaseline, evaluate_mlm, mlm_baseline, unigram_baseline
from torchrecipes.evaluation.running import RunningSum
from torchrecipes.models import neobert

VOCAB, REAL = 50, 45


class Tokens:
    """The part of a corpus that is read."""

    def __init__(self, tokens):
        self.tokens, self.num_tokens = np.array(tokens, dtype=np.uint16), len(tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    for used in (7, 3):
        positions, labels = torch.zeros(8, dtype=torch.int64), torch.full((8,), -100)
        positions[:used] = torch.randperm(24, generator=generator)[:used]
        labels[:used] = torch.randint(5, REAL, (used,), generator=generator)
        yield Batch(
            input_ids=torch.randint(0, REAL, (2, 12), generator=generator),
            position_ids=torch.arange(12).expand(2, 12),
            document_ids=None,
            cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32),
            max_seqlen=12,
            num_targets=used,
            masked_positions=positions,
            masked_labels=labels,
        )


def test_the_baseline_is_the_frequency_of_ordinary_tokens():
    baseline = unigram_baseline(Tokens([2, 7, 7, 7, 9, 3, 2, 9, 11, 3]), special_ids=[2, 3], vocab_size=12)
    assert baseline.most_frequent == 7
    expected = torch.full((12,), -math.inf)
    expected[[7, 9, 11]] = torch.tensor([3 / 6, 2 / 6, 1 / 6]).log()
    assert torch.allclose(baseline.log_probability, expected)


def test_scores_equal_a_loop_over_targets_in_float64():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    shares = torch.arange(1, VOCAB + 1).double()
    baseline = UnigramBaseline((shares / shares.sum()).log().float(), most_frequent=11)
    settings = {"unpadded_vocab_size": REAL, "baseline": baseline, "autocast": nullcontext}
    scores = evaluate_mlm(model, batches(), **settings, position_edges=(0, 5, 12))

    by_position = {"loss/0-4": [], "loss/5-11": []}
    loss, right, unigram_loss, unigram_right, count = 0.0, 0, 0.0, 0, 0
    for batch in batches():
        logits = model.head(model(batch.input_ids)).double().flatten(0, 1)
        for position, label in zip(batch.masked_positions.tolist(), batch.masked_labels.tolist(), strict=True):
            if label >= 0:
                loss -= logits[position].log_softmax(-1)[label].item()
                name = "loss/0-4" if position % 12 < 5 else "loss/5-11"
                by_position[name].append(-logits[position].log_softmax(-1)[label].item())
                right += logits[position, :REAL].argmax().item() == label
                unigram_loss -= math.log(shares[label] / shares.sum())
                unigram_right += label == 11
                count += 1
    assert scores["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert scores["accuracy"] == pytest.approx(right / count)
    assert scores["unigram_loss"] == pytest.approx(unigram_loss / count, rel=1e-5)
    assert scores["unigram_accuracy"] == pytest.approx(unigram_right / count)
    assert scores["targets"] == count
    for name, losses in by_position.items():
        assert scores[name] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_inert_tokens_are_never_predicted():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)

    class Head(torch.nn.Module):
        """Likes the inert token 49 best, the label second."""

        weight, bias, transform = torch.zeros(VOCAB, 16), torch.zeros(VOCAB), torch.nn.Identity()

    Head.bias[49], Head.bias[20] = 9.0, 5.0
    model.head = Head()
    batch = next(iter(batches()))
    batch.masked_labels[:7] = 20
    baseline = UnigramBaseline(torch.zeros(VOCAB), 0)
    scores = evaluate_mlm(model, [batch], unpadded_vocab_size=REAL, baseline=baseline, autocast=nullcontext)
    assert scores["accuracy"] == 1


def test_nothing_of_the_training_is_touched():
    model = neobert(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    baseline = UnigramBaseline(torch.zeros(VOCAB), 0)
    evaluate_mlm(model, batches(), unpadded_vocab_size=REAL, baseline=baseline, autocast=nullcontext)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_batches_give_nan():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    scores = evaluate_mlm(model, [], REAL, UnigramBaseline(torch.zeros(VOCAB), 0), nullcontext)
    assert scores.pop("targets") == 0
    assert len(scores) == 5 and all(math.isnan(value) for value in scores.values())


def test_a_linear_layer_is_a_head():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)

        def forward(self, input_ids, position_ids, document_ids, cu_seqlens, max_seqlen):
            return self.embedding(input_ids)

    baseline = UnigramBaseline(torch.full((VOCAB,), 1 / VOCAB).log(), most_frequent=7)
    scores = evaluate_mlm(Net(), batches(), unpadded_vocab_size=REAL, baseline=baseline, autocast=nullcontext)
    assert 0 < scores["loss"] < 10


class Guesses(torch.nn.Module):
    """Hidden states are logits of its own choice."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)  # [positions, V]
        self.head = torch.nn.Linear(logits.shape[1], logits.shape[1])
        torch.nn.init.eye_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, position_ids, document_ids, cu_seqlens, max_seqlen):
        return self.logits.unflatten(0, input_ids.shape)


@pytest.fixture(scope="module")
def names():
    """A tokenizer of characters, and its ids of a few names, in which the dot is the most frequent character."""
    texts = [f"{a}.{b}-{c}.{d}" for a in "abca" for b in "aab" for c in "12" for d in ("com", "ca")]
    tokenizer = train_char([Document(text, "") for text in texts])
    return tokenizer, [tokenizer.encode(text) for text in texts]


def masked_names(tokenizer, ids, mlm_probability=0.3):
    """Two batches of a row each."""
    for seed, part in enumerate((ids[:20], ids[20:])):
        tokens = np.array([token for name in part for token in name])[None]
        starts = np.cumsum([0, *map(len, part)])[:-1]
        documents = document_fields(starts, tokens.shape)
        positions, labels, num_targets = MLMCollator(tokenizer, mlm_probability)(tokens, np.uint64([seed]))
        yield Batch(
            input_ids=torch.from_numpy(tokens),
            num_targets=num_targets,
            masked_positions=torch.from_numpy(positions),
            masked_labels=torch.from_numpy(labels),
            **documents,
        )


class Documents(Tokens):
    def __init__(self, ids):
        super().__init__([token for name in ids for token in name])
        self.starts = np.cumsum([0, *map(len, ids)])

    def boundaries(self, start, stop):
        return self.starts[(self.starts > start) & (self.starts < stop)]


def test_scores_by_kind_of_character_equal_a_loop(names):
    tokenizer, ids = names
    held_out, training = ids[::3], ids[1::3] + ids[2::3]
    baseline = mlm_baseline(Documents(held_out), tokenizer, [Documents(training)])
    batches = list(masked_names(tokenizer, held_out * 3))
    generator = torch.Generator().manual_seed(0)
    widest = max(batch.input_ids.numel() for batch in batches)
    logits = torch.randn(widest, tokenizer.vocab_size, generator=generator)
    model = Guesses(logits)
    model.forward = lambda input_ids, **_: logits[: input_ids.numel()].unflatten(0, input_ids.shape)
    scores = evaluate_mlm(model, batches, tokenizer.vocab_size, baseline, nullcontext)

    kinds = {"letter": [], "digit": [], "hyphen": [], "dot": []}
    counts = Counter(token for name in held_out for token in name if token not in tokenizer.special_ids)
    for batch in batches:
        rows, starts = batch.input_ids.flatten().tolist(), batch.cu_seqlens.tolist()
        labels = dict(zip(batch.masked_positions.tolist(), batch.masked_labels.tolist(), strict=True))
        true = [labels[i] if labels.get(i, -100) >= 0 else token for i, token in enumerate(rows)]
        windows = baseline.characters.ngrams.windows(
            *(torch.tensor([x]) for x in (true, batch.position_ids.flatten().tolist())),
            torch.arange(len(true)),
            torch.tensor(true),
        )
        trigrams = list(baseline.characters.ngrams.score(windows.numpy()))[2]
        for position, label in labels.items():
            if label >= 0:
                text = tokenizer.decode([label])
                kind = {"-": "hyphen", ".": "dot"}.get(text, "digit" if text.isdigit() else "letter")
                likely = logits[position].double().log_softmax(-1)
                kinds[kind].append(
                    {
                        "loss": -likely[label].item(),
                        "accuracy": likely.argmax().item() == label,
                        "hidden": rows[position] != label,
                        "unigram_loss": -math.log(counts[label] / counts.total()),
                        "trigram_loss": -math.log(trigrams[0][position]),
                        "trigram_accuracy": trigrams[1][position] == label,
                        "label": label,
                    }
                )
        assert starts[-1] == len(rows)
    everything = [target for targets in kinds.values() for target in targets]
    for suffix, targets in [("", everything), *((f"/{kind}", targets) for kind, targets in kinds.items())]:
        assert scores[f"targets{suffix}"] == len(targets) > 0
        for name in ("loss", "accuracy", "unigram_loss", "trigram_loss", "trigram_accuracy"):
            assert scores[name + suffix] == pytest.approx(np.mean([target[name] for target in targets]), rel=1e-5)
        hidden = [target for target in targets if target["hidden"]]
        assert 0 < len(hidden) < len(targets) or f"hidden_loss{suffix}" not in scores
        for name in ("loss", "accuracy") if len(hidden) < len(targets) else ():
            assert scores[f"hidden_{name}{suffix}"] == pytest.approx(np.mean([t[name] for t in hidden]), rel=1e-5)
    assert "hidden_loss" in scores and "hidden_accuracy/letter" in scores
    favourite = max((token for token in counts if tokenizer.decode([token]) in "abcom"), key=lambda t: counts[t])
    letters = [target["label"] == favourite for target in kinds["letter"]]
    assert any(letters) and scores["unigram_accuracy/letter"] == pytest.approx(np.mean(letters))
    assert "unigram_accuracy/dot" not in scores and "perplexity/letter" not in scores and "loss/other" not in scores
    assert scores["fivegram_loss"] < scores["trigram_loss"] < scores["unigram_loss"]


def test_words_have_no_kinds(names):
    tokenizer, _ = names
    assert [KINDS[kind] for kind in character_kinds(tokenizer)[[0, *tokenizer.encode("a1-.")[1:-1]]]] == [
        "other",
        "letter",
        "digit",
        "hyphen",
        "dot",
    ]
    words = train_wordpiece([Document("some words and some more words", "")], vocab_size=60)
    assert character_kinds(words) is None
    assert mlm_baseline(Tokens([7, 8, 7]), words, [Tokens([7])]).characters is None
    large = train_char([Document("".join(map(chr, range(0x4E00, 0x4F00))), "")])
    assert mlm_baseline(Tokens([7, 8, 7]), large, [Tokens([7])]).characters.ngrams is None


def test_classes_of_documents_equal_a_loop():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model.document_head = torch.nn.Linear(16, 4)
    positions = torch.tensor([0, 5, 12, 0])
    classed = [
        replace(batch, class_positions=positions, class_labels=torch.tensor(labels), class_weights=torch.ones(4))
        for batch, labels in zip(batches(), ([3, 1, 1, -100], [1, -100, 2, -100]), strict=True)
    ]
    settings = (REAL, UnigramBaseline(torch.zeros(VOCAB), 0), nullcontext)
    scores = evaluate_mlm(model, classed, *settings)
    losses, hits = [], []
    for batch in classed:
        hidden = model(batch.input_ids).flatten(0, 1)
        for position, label in zip(positions.tolist(), batch.class_labels.tolist(), strict=True):
            if label >= 0:
                likely = model.document_head(hidden[position]).double().log_softmax(-1)
                losses.append(-likely[label].item())
                hits.append(likely.argmax().item() == label)
    assert scores["class_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores["class_accuracy"] == pytest.approx(np.mean(hits))
    assert scores["class_majority_accuracy"] == pytest.approx(3 / 5)
    without = [replace(batch, class_labels=torch.full((4,), -100)) for batch in classed]
    assert not any(name.startswith("class") for name in evaluate_mlm(model, without, *settings))
    del model.document_head
    with pytest.raises(UserError) as error:
        evaluate_mlm(model, classed, *settings)
    assert error.value.code == "no_document_head"


def test_sums_in_two_float32_are_as_exact_as_float64():
    numbers = np.random.default_rng(0).uniform(0, 10, (5_000, 2)).astype(np.float32)
    total = RunningSum((2,), torch.device("cpu"), torch.float32)
    for number in torch.from_numpy(numbers):
        total.add(number)
    expected = [math.fsum(column) for column in numbers.T.tolist()]
    assert total.over_ranks().dtype == torch.float64
    assert total.over_ranks().tolist() == pytest.approx(expected, rel=1e-11)
    assert np.cumsum(numbers, axis=0, dtype=np.float32)[-1].tolist() != pytest.approx(expected, rel=1e-8)


class Waits(TorchDispatchMode):
    """Counts operations for which a GPU's host waits."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "bincount")
        return function(*args, **(kwargs or {}))


def test_a_batch_more_is_no_wait_for_the_device_more(names):
    tokenizer, ids = names
    baseline = mlm_baseline(Documents(ids), tokenizer, [Documents(ids)])
    batches = list(masked_names(tokenizer, ids * 2))
    logits = torch.zeros(max(batch.input_ids.numel() for batch in batches), tokenizer.vocab_size)
    model = Guesses(logits)
    model.forward = lambda input_ids, **_: logits[: input_ids.numel()].unflatten(0, input_ids.shape)
    counts = []
    for several in (batches[:1], batches * 3):
        with Waits() as waits:
            evaluate_mlm(model, several, tokenizer.vocab_size, baseline, nullcontext)
        counts.append(waits.count)
    assert counts[0] == counts[1]
