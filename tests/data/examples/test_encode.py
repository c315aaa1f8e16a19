"""Tokens of examples against `transformers`' fast tokenizers, lengths of prompts against `sentence-transformers`."""

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from torchrecipes.data.examples import Example, ExampleEncoder
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers import load_tokenizer, train_wordpiece
from torchrecipes.errors import UserError

transformers = pytest.importorskip("transformers")

WORDS = "the a dog cat bird runs sleeps eats sees big small red blue house tree query passage :".split()


def sentence(generator, longest=30) -> str:
    return " ".join(generator.choice(WORDS, generator.integers(1, longest)))


def bert(folder):
    generator = np.random.default_rng(0)
    train_wordpiece([Document(sentence(generator), str(i)) for i in range(50)], vocab_size=150).save(folder)


def roberta(folder):
    """Byte-level BPE with RoBERTa's post-processor: two separators between sentences."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    special = [AddedToken(name, special=True) for name in names]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    generator = np.random.default_rng(0)
    backend.train_from_iterator([sentence(generator) for _ in range(50)], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    roles = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": name for role, name in roles.items()}
    )
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module", params=[bert, roberta], ids=["bert", "roberta"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("max_length", [5, 6, 7, 16, 17, 24, 64])
def test_two_sentences_are_cut_as_transformers_cuts_them(both, max_length):
    ours, theirs = both
    if max_length == 5 and theirs.num_special_tokens_to_add(pair=True) == 4:
        pytest.skip("no room for two sentences")
    generator = np.random.default_rng(max_length)
    pairs = [(sentence(generator), sentence(generator)) for _ in range(200)]
    pairs += [("dog", "cat"), ("dog", sentence(generator, 60)), (sentence(generator, 60), "dog")]
    encoded = ExampleEncoder(ours, "labeled", ("text", "text_pair"), max_length).encode([Example(p) for p in pairs])
    wanted = theirs(*map(list, zip(*pairs, strict=True)), truncation="longest_first", max_length=max_length)
    pieces = np.split(encoded.tokens, np.cumsum(encoded.text_lengths)[:-1])
    assert [piece.tolist() for piece in pieces] == wanted["input_ids"]
    for i, start in enumerate(encoded.second_starts):
        sequence = wanted.sequence_ids(i)
        assert start == sequence.index(1)
    uncut = theirs(*map(list, zip(*pairs, strict=True)))["input_ids"]
    assert encoded.truncated.tolist() == [len(ids) > max_length for ids in uncut]


@pytest.mark.parametrize("max_length", [3, 8, 64])  # 3: no room for a prompt
def test_a_text_is_cut_as_transformers_cuts_it(both, max_length):
    ours, theirs = both
    generator = np.random.default_rng(max_length)
    examples = [Example(tuple(sentence(generator) for _ in range(3))) for _ in range(50)]
    prompts = {"query": "query: ", "passage": "passage: "} if max_length > 3 else {"query": "", "passage": ""}
    columns = ("query", "positive", "negative")
    encoded = ExampleEncoder(ours, "pairs", columns, max_length, prompts).encode(examples)
    texts = [
        prompts["query" if column == 0 else "passage"] + text
        for example in examples
        for column, text in enumerate(example.texts)
    ]
    wanted = theirs(texts, truncation=True, max_length=max_length)["input_ids"]
    pieces = np.split(encoded.tokens, np.cumsum(encoded.text_lengths)[:-1])
    assert [piece.tolist() for piece in pieces] == wanted
    assert (encoded.second_starts == encoded.text_lengths).all()


def test_prompt_lengths_are_those_of_sentence_transformers(both, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    ours, theirs = both
    encoder = ExampleEncoder(ours, "pairs", ("query", "positive"), 64, {"query": "query: the dog: ", "positive": "a "})
    config = transformers.BertConfig(
        vocab_size=ours.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    wanted = [model.preprocess(["dog"], prompt=prompt)["prompt_length"] for prompt in ("query: the dog: ", "a ")]
    assert list(encoder.prompt_lengths) == wanted


def test_prompts_by_kind(both):
    ours, _ = both
    prompts = {"query": "q", "document": "d", "": "all"}
    assert ExampleEncoder(ours, "pairs", ("query", "positive", "negative"), 64, prompts).prompts == ("q", "d", "d")
    assert ExampleEncoder(ours, "scored_pairs", ("sentence1", "sentence2"), 64, prompts).prompts == ("all", "all")
    assert ExampleEncoder(ours, "texts", ("text",), 64, {}).prompt_lengths == (0,)
    with pytest.raises(UserError) as error:
        ExampleEncoder(ours, "pairs", ("query", "positive"), 64, {"qurey": "q"})
    assert (error.value.code, error.value.key) == ("unknown_prompt", "prompts.qurey") and "query" in error.value.hint
    with pytest.raises(UserError) as error:
        ExampleEncoder(ours, "pairs", ("query", "positive"), 2)
    assert (error.value.code, error.value.key) == ("invalid_value", "seq_len")
    length = ExampleEncoder(ours, "pairs", ("query", "positive"), 64, {"query": "the query"}).prompt_lengths[0]
    with pytest.raises(UserError) as error:
        ExampleEncoder(ours, "pairs", ("query", "positive"), length + 1, {"query": "the query"})
    assert (error.value.code, error.value.key) == ("invalid_value", "seq_len")
    ExampleEncoder(ours, "pairs", ("query", "positive"), length + 2, {"query": "the query"})


def test_a_text_without_tokens_of_its_own_takes_its_example_along(tmp_path):
    bert(tmp_path)
    encoder = ExampleEncoder(load_tokenizer(tmp_path), "pairs", ("query", "positive"), 64)
    encoded = encoder.encode([Example(("dog", "\x01")), Example(("dog", "bird"))])  # BERT drops control characters
    assert encoded.kept.tolist() == [False, True] and len(encoded.text_lengths) == 2
