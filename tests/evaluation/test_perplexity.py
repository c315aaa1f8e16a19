import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchrecipes import models
from torchrecipes.errors import UserError
from torchrecipes.evaluation.text_perplexity import Tokens, encode_documents, perplexity, windows
from torchrecipes.models import save_hf
from torchrecipes.modules.head import LMHead

VOCAB = 11


class Counting(nn.Module):
    """Knows nothing but how many tokens it has seen: with n of them it gives every token but 0 the logit -n
    / 10.
    """

    def __init__(self, positions=16):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=positions, vocab_size=VOCAB)
        self.head = LMHead(1, VOCAB)
        self.seen, self.packed = [], []
        with torch.no_grad():
            self.head.decoder.weight.fill_(-0.1)
            self.head.decoder.weight[0] = 0

    def forward(self, input_ids, position_ids, document_ids, cu_seqlens, max_seqlen):
        self.seen.append(input_ids.shape)
        assert max_seqlen <= input_ids.shape[1]
        if cu_seqlens is not None:
            ends = cu_seqlens.tolist()
            assert ends[0] == 0 and ends[-1] == input_ids.numel() and all(a < b for a, b in pairwise(ends))
            restarts = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
            assert torch.equal(position_ids.flatten(), restarts) and max(restarts) < max_seqlen
            assert ((position_ids == 0).cumsum(1) - 1 == document_ids).all()
        self.packed.append(cu_seqlens is not None)
        return (position_ids + 1.0)[:, :, None]


def nats(tokens_before, token):
    logits = torch.full((VOCAB,), -0.1 * tokens_before, dtype=torch.float64)
    logits[0] = 0
    return -logits.log_softmax(-1)[token].item()


def documents(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Tokens(torch.randint(VOCAB, (n,), generator=generator).tolist(), 3 * n) for n in lengths]


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    model = Counting()
    nn.init.zeros_(model.head.decoder.weight)
    found = perplexity(model, documents(5, 1, 40, 17), stride=3)
    assert (found.documents, found.tokens, found.bytes) == (4, 4 + 0 + 39 + 16, 3 * 63)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(59 * math.log2(VOCAB) / 189, rel=1e-6)
    assert found.as_dict()["bytes_per_token"] == pytest.approx(189 / 59)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (16, 1), (7, 3), (1, 1), (5, 5), (None, None)])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_token_is_scored_once_with_enough_before_it(window, stride, rows):
    given = documents(2, 60, 33, 1, 16, 17, 18, 3, 5)
    found = perplexity(Counting(), iter(given), window=window, stride=stride, rows=rows)
    window, stride = window or 16, stride or 8
    expected, scored = 0.0, 0
    for ids, _ in given:
        for i in range(1, len(ids)):
            # A window holds the tokens [start, start + window]; the first that reaches token i scores it.
            start = 0 if i <= window else stride * math.ceil((i - window) / stride)
            assert i - start >= min(i, window - stride + 1)
            expected += nats(i - start, ids[i])
            scored += 1
    assert found.tokens == scored
    assert found.total_nll == pytest.approx(expected, rel=1e-6)


def test_the_loss_by_position_in_the_window():
    given = documents(17, 9, 33)
    found = perplexity(Counting(), iter(given), stride=16, position_edges=(0, 8, 16))
    losses = {"loss/0-7": [], "loss/8-15": []}
    for ids, _ in given:
        for place, token in enumerate(ids[1:]):  # windows of 16 that do not overlap
            name = "loss/0-7" if place % 16 < 8 else "loss/8-15"
            losses[name].append(nats(place % 16 + 1, token))
    assert found.by_position == pytest.approx({name: sum(all_) / len(all_) for name, all_ in losses.items()}, rel=1e-5)


def test_windows_of_a_long_document():
    found = list(windows(list(range(10)), window=4, stride=2))
    assert found == [([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5, 6], 3), ([4, 5, 6, 7, 8], 3), ([6, 7, 8, 9], 3)]


def test_short_documents_share_rows():
    model = Counting()
    perplexity(model, documents(*[5] * 64), rows=2)
    assert sum(rows for rows, _ in model.seen) == 16  # four documents of four tokens that are read fill a row of 16
    assert {width for _, width in model.seen} == {16} and all(model.packed)


def test_no_more_is_computed_than_the_text_needs():
    model = Counting(positions=32_768)
    perplexity(model, documents(9))
    assert model.seen == [(1, 8)]
    model = Counting(positions=32_768)
    found = perplexity(model, documents(*[101] * 1000))
    computed = [rows * width for rows, width in model.seen]
    assert found.tokens == 100_000 and sum(computed) < 103_000
    assert all(15_000 < number <= 16_384 for number in computed[:-1])


def test_a_number_of_rows_is_one_of_windows_full_of_tokens():
    model = Counting(positions=4096)
    perplexity(model, documents(*[65] * 300), rows=2)
    assert [rows * width for rows, width in model.seen] == [8192, 8192, 3072]  # 19,200 tokens
    model = Counting(positions=4096)
    perplexity(model, documents(4097, *[65] * 64), rows=2)
    assert model.seen == [(2, 4096)]


def test_rows_of_many_lengths_score_what_one_row_each_does():
    given = documents(3000, 1, 2, 700, 20, 2049, 1024, 1025, 1026, 5, 300)
    expected = sum(nats(i, ids[i]) for ids, _ in given for i in range(1, len(ids)))
    for rows in (None, 1, 3):
        found = perplexity(Counting(positions=4096), given, rows=rows)
        assert found.total_nll == pytest.approx(expected, rel=1e-6)


def test_windows_that_have_a_row_for_themselves_need_no_boundaries():
    model = Counting()
    perplexity(model, documents(17, 17, 16, 100), rows=2, stride=16)
    assert model.packed.count(True) <= 1


def test_the_order_of_documents_and_the_batches_do_not_matter():
    given = documents(*range(1, 60))
    one = perplexity(Counting(), given, rows=1).total_nll
    assert perplexity(Counting(), given[::-1], rows=50).total_nll == pytest.approx(one, rel=1e-6)


def test_it_tells_how_far_it_is():
    told = []
    found = perplexity(Counting(), documents(*[40] * 200), rows=2, on_progress=lambda *numbers: told.append(numbers))
    assert len(told) > 10
    assert [sum(numbers) for numbers in zip(*told, strict=True)] == [found.documents, found.bytes, found.tokens]


def test_it_tells_how_far_it_is_in_a_long_document():
    told = []
    perplexity(Counting(), documents(1000), rows=1, on_progress=lambda *numbers: told.append(numbers))
    assert all(num_bytes > 0 for _, num_bytes, _ in told[:-1]) and sum(numbers[1] for numbers in told) == 3000
    assert [documents for documents, _, _ in told] == [0] * (len(told) - 1) + [1]


def test_training_goes_on_as_before():
    model = Counting().train()
    before = torch.get_rng_state()
    perplexity(model, documents(5))
    assert model.training and torch.equal(torch.get_rng_state(), before)
    perplexity(model.eval(), documents(5))
    assert not model.training


def test_nothing_to_score_is_no_number():
    found = perplexity(Counting(), [])
    assert found.tokens == 0 and math.isnan(found.perplexity) and math.isnan(found.bits_per_byte)
    assert math.isnan(perplexity(Counting(), documents(1)).nll_per_token)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"window": 17}, "window"),
        ({"window": 0}, "window"),
        ({"window": 8, "stride": 9}, "stride"),
        ({"stride": 0}, "stride"),
        ({"rows": 0}, "rows"),
    ],
)
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(UserError) as error:
        perplexity(Counting(), documents(5), **settings)
    assert (error.value.key, error.value.code) == (key, "out_of_range")


def test_ids_of_another_tokenizer_are_refused():
    model = Counting().train()
    with pytest.raises(UserError) as error:
        perplexity(model, [Tokens([1, 11], 2)])
    assert error.value.code == "id_out_of_range" and "11" in str(error.value) and model.training


class Template:
    """A tokenizer of letters (a is 10) that puts `before` and `after` around a text."""

    def __init__(self, before, after, **ids):
        self.before, self.after = before, after
        self.bos_id = self.eos_id = self.cls_id = self.sep_id = None
        vars(self).update(ids)

    def encode_batch(self, texts):
        return [[*self.before, *(ord(letter) - 87 for letter in text), *self.after] for text in texts]


@pytest.mark.parametrize(
    ("tokenizer", "begin"),
    [
        (Template([1], [], bos_id=1, eos_id=1), 1),
        (Template([1], [2], bos_id=1, eos_id=2), 1),
        (Template([], [2], bos_id=None, eos_id=2), 2),
        (Template([], [], bos_id=1, eos_id=2), 1),
        (Template([3], [4], cls_id=3, sep_id=4), 3),
    ],
)
def test_a_text_is_read_after_what_begins_it_and_without_what_ends_it(tokenizer, begin):
    texts = ["abc", "", "a"]
    found = list(encode_documents(tokenizer, texts, at_once=2))
    assert found == [([begin, 10, 11, 12], 3), ([begin], 0), ([begin, 10], 1)]


def test_bytes_are_those_of_the_text():
    tokenizer = Template([1], [], eos_id=1)
    tokenizer.encode_batch = lambda texts: [[1, 5]] * len(texts)
    assert [document.num_bytes for document in encode_documents(tokenizer, ["é", "水a"])] == [2, 4]


def test_a_tokenizer_without_a_beginning_is_told():
    with pytest.raises(UserError) as error:
        list(encode_documents(Template([], []), ["a"]))
    assert error.value.code == "no_bos_token"


SIZES = {
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    },
    "gpt2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    },
}
SIZES["qwen3_moe"] = SIZES["llama"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.skipif(not hasattr(models, family), reason="there is no such family"))
        for family in SIZES
    ],
)
def test_the_figure_is_that_of_a_plain_loop_over_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = getattr(models, family)(vocab_size=53, **SIZES[family], seed=1)
    save_hf(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    theirs.set_experts_implementation("eager")  # its grouped products know no float64
    generator = torch.Generator().manual_seed(0)
    given = [Tokens(torch.randint(53, (n,), generator=generator).tolist(), 2 * n) for n in (60, 2, 25, 24, 7, 1, 26)]
    window, stride, expected, scored = 24, 10, 0.0, 0
    for ids, _ in given:
        known = 1  # tokens that need no score, or have theirs
        for start in range(0, len(ids), stride):
            inputs = torch.tensor([ids[start : start + window]])
            with torch.no_grad():
                log_p = theirs(inputs).logits[0].double().log_softmax(-1)
            for i in range(known, min(start + window, len(ids) - 1) + 1):
                expected -= log_p[i - 1 - start, ids[i]].item()
                scored += 1
            known = max(known, min(start + window, len(ids) - 1) + 1)
    found = perplexity(model, given, window=window, stride=stride, rows=3)
    assert found.tokens == scored == sum(len(ids) - 1 for ids, _ in given)
    assert found.total_nll == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / scored), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / sum(n for _, n in given), rel=1e-5)
