"""Tokenizers: trained, loaded, saved; against `transformers`, and against what users give by mistake."""

import json
import pickle
import pydoc_data.topics
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer

from torchrecipes.data.sources.records import Document, ReadStats
from torchrecipes.data.tokenizers.load import load_tokenizer, train_bpe, train_unigram, train_wordpiece
from torchrecipes.errors import UserError

TRAINERS = {"wordpiece": train_wordpiece, "bpe": train_bpe, "unigram": train_unigram}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "The quick brown fox; it's 3.14 times faster.",
    "  Blanks   before,\tbetween\n\nand after  ",
    "Éa Über ﬁne straße İstanbul 中文字 ｶﾞ 🙂 e\u0301",
    "x",
    "do n't . stop , now",
]


def topics() -> list[Document]:
    chosen = sorted(pydoc_data.topics.topics.items())[:40]
    return [Document(text, name) for name, text in chosen] + [Document("naïve façade — 中文 你好 中文 🙂", "other")] * 3


class Topics(list):
    """A source for a run that keeps its tokenizer."""

    name, num_bytes, report = "topics", 0, ReadStats()

    def __init__(self, fingerprint="topics-1"):
        super().__init__(topics())
        self.fingerprint = fingerprint


@pytest.fixture(scope="module")
def trained():
    return {kind: train(topics(), vocab_size=1500) for kind, train in TRAINERS.items()}


@pytest.mark.parametrize("kind", TRAINERS)
def test_special_tokens_and_sizes(trained, kind):
    tokenizer = trained[kind]
    assert [tokenizer.backend.id_to_token(i) for i in range(5)] == SPECIAL
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.unpadded_vocab_size == 1500
    assert tokenizer.vocab_size == 1536 == tokenizer.backend.get_vocab_size(with_added_tokens=True)
    assert tokenizer.special_ids == [0, 1, 2, 3, 4, *range(1500, 1536)]
    assert tokenizer.backend.id_to_token(1500) == "<|inert_0|>"


@pytest.mark.parametrize("kind", TRAINERS)
def test_same_documents_give_the_same_tokenizer_in_every_process(kind):
    # Hash tables have another order in another process, and that is where an order can come from.
    script = (
        "import pydoc_data.topics, sys\n"
        "from torchrecipes.data import tokenizers\n"
        "from torchrecipes.data.sources.records import Document\n"
        "texts = [text for _, text in sorted(pydoc_data.topics.topics.items())[:20]]\n"
        "train = getattr(tokenizers, 'train_' + sys.argv[1])\n"
        "print(train([Document(text, 'x') for text in texts], vocab_size=700).fingerprint)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, kind]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in processes}
    assert found == {TRAINERS[kind](topics()[:20], vocab_size=700).fingerprint}


def test_wordpiece_is_greedy_over_its_vocabulary(trained):
    # The algorithm of the paper, in a few lines: the longest piece first.
    tokenizer = trained["wordpiece"]
    vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
    for word in ("functions", "the", "zzyzx", "a"):
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in vocab), None)
            if end is None:
                pieces = ["[UNK]"]
                break
            pieces.append(prefix + word[start:end])
            start = end
        assert tokenizer.encode(word) == [2, *(vocab[piece] for piece in pieces), 3]


def test_wordpiece_limits_its_alphabet_by_frequency():
    tokenizer = train_wordpiece(
        [Document("aaaa bbb cc d " * 3, "x")], vocab_size=64, limit_alphabet=3, pad_vocab_to_multiple_of=1
    )
    vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
    assert {"a", "b", "c", "##a", "##b", "##c"} <= set(vocab) and "d" not in vocab
    assert tokenizer.encode("d") == [2, tokenizer.unk_id, 3]


def test_lowercase_and_its_absence():
    documents = [Document("Alpha ALPHA alpha Ünder", "x")] * 5
    lower, upper = (train_wordpiece(documents, vocab_size=200, lowercase=flag) for flag in (True, False))
    assert lower.encode("ALPHA under") == lower.encode("alpha Ünder")
    assert upper.encode("ALPHA") != upper.encode("alpha")


def test_byte_level_bpe_gives_every_text_back(trained):
    tokenizer = trained["bpe"]
    for text in [*TEXTS, "\x00\x07 \u200b", "𝔘𝔫𝔦"]:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        expected = normalizers.NFC().normalize_str(text)
        assert tokenizer.decode(ids[1:-1]) == expected


@pytest.mark.parametrize("kind", TRAINERS)
def test_names_of_special_tokens_in_a_document_are_text(trained, kind):
    tokenizer = trained[kind]
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.special_ids]
    for text in (*names, "a [MASK] b[SEP]c <|inert_3|>", "[CLS][CLS]", "[MASK] [MASK]"):
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, text])):
            assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
            assert set(ids[1:-1]) & set(tokenizer.special_ids) <= {tokenizer.unk_id}
    assert tokenizer.encode_prompt("[MASK] [SEP]")[1:-1].count(tokenizer.mask_id) == 1


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_mask_in_a_prompt_stands_for_the_word_with_its_blank(trained, kind):
    tokenizer = trained[kind]
    ids, whole = tokenizer.encode_prompt("return the [MASK] of"), tokenizer.encode("return the of")
    position = ids.index(tokenizer.mask_id)
    assert ids[:position] + ids[position + 1 :] == whole


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("family", [None, "bert", "eurobert"])
def test_auto_tokenizer_reads_what_is_saved(trained, kind, family, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path, model_max_length=512)
    if family:  # a checkpoint's folder names a family, whose own tokenizer class must not be taken
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert len(hf) == tokenizer.vocab_size and hf.model_max_length == 512
    for role in ("mask", "cls", "sep", "pad", "unk"):
        assert getattr(hf, f"{role}_token_id") == getattr(tokenizer, f"{role}_id")
    for text in [*TEXTS, "the [MASK] is [MASK]ed [SEP]", *(d.text for d in topics()[:5])]:
        found = hf(text)
        assert list(found) == ["input_ids", "attention_mask"]
        assert found["input_ids"] == tokenizer.encode_prompt(text)
        assert hf.decode(found["input_ids"]) == tokenizer.decode(found["input_ids"])
    for text in TEXTS:
        assert hf(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("kind", TRAINERS)
def test_saved_and_loaded_is_the_same(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "a")
    hf = AutoTokenizer.from_pretrained(tmp_path / "a")
    hf.save_pretrained(tmp_path / "b")  # and written once more by transformers
    for folder in ("a", "b"):
        loaded = load_tokenizer(tmp_path / folder)
        for name in ("vocab_size", "unpadded_vocab_size", "special_ids", "fingerprint", "mask_id", "pad_id", "cls_id"):
            assert getattr(loaded, name) == getattr(tokenizer, name), name
        assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").fingerprint == tokenizer.fingerprint
    other = load_tokenizer(tmp_path / "a", pad_vocab_to_multiple_of=1000)
    assert (other.vocab_size, other.unpadded_vocab_size, other.fingerprint) == (2000, 1500, tokenizer.fingerprint)


def test_fingerprint_tells_tokenizers_apart(trained):
    other = train_wordpiece(topics(), vocab_size=1499)
    cased = train_wordpiece(topics(), vocab_size=1500, lowercase=False)
    assert len({t.fingerprint for t in (*trained.values(), other, cased)}) == 5


def test_pickled_it_still_takes_documents_as_text(trained):
    tokenizer = trained["unigram"]
    tokenizer.encode("made before pickling")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a [MASK]") == tokenizer.encode("a [MASK]")
    assert copy.mask_id not in copy.encode("a [MASK]")


def test_decode_token(trained):
    tokenizer = trained["wordpiece"]
    assert tokenizer.decode_token(tokenizer.mask_id) == "[MASK]"
    assert tokenizer.decode_token(tokenizer.encode("the")[1]) == "the"


def test_a_folder_keeps_what_was_trained(tmp_path):
    first = train_wordpiece(Topics(), vocab_size=500, folder=tmp_path / "t")
    changed = Topics()
    changed.clear()  # what is kept is taken: nothing is read
    again = train_wordpiece(changed, vocab_size=500, folder=tmp_path / "t")
    assert again.fingerprint == first.fingerprint and again.special_ids == first.special_ids
    for train, names in (
        (lambda: train_wordpiece(Topics(), vocab_size=600, folder=tmp_path / "t"), ("vocab_size", "500", "600")),
        (lambda: train_wordpiece(Topics("topics-2"), vocab_size=500, folder=tmp_path / "t"), ("topics-1", "topics-2")),
        (lambda: train_bpe(Topics(), vocab_size=500, folder=tmp_path / "t"), ("wordpiece", "bpe")),
    ):
        with pytest.raises(UserError) as error:
            train()
        assert error.value.code == "other_tokenizer" and all(name in str(error.value) for name in names)
    bpe = train_bpe(Topics(), vocab_size=500, folder=tmp_path / "b")
    kept = train_bpe(changed, vocab_size=500, folder=tmp_path / "b")
    assert kept.encode_prompt("the [MASK]") == bpe.encode_prompt("the [MASK]")


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_vocabulary_too_small_for_the_characters(kind):
    with pytest.raises(UserError) as error:
        TRAINERS[kind](topics(), vocab_size=40)
    assert error.value.key == "vocab_size" and "40" in str(error.value)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_little_text_gives_fewer_tokens_than_asked(kind):
    tokenizer = TRAINERS[kind]([Document("one two one two", "x")], vocab_size=5000)
    assert tokenizer.unpadded_vocab_size < 300 and tokenizer.vocab_size % 64 == 0
    assert tokenizer.decode(tokenizer.encode("one two")[1:-1]).strip() == "one two"


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_documents(kind):
    empty = Topics()
    empty.clear()
    with pytest.raises(UserError) as error:
        TRAINERS[kind](empty, vocab_size=500)
    assert error.value.code == "no_documents" and "topics" in str(error.value)


# Files of others


def roberta_like(extra=()):
    backend = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet, *extra])}
    backend.model = models.BPE(vocab, [])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "<pad>", "</s>", "<unk>")])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend


def write_folder(folder, backend, **config):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def test_roles_come_from_the_folder_and_missing_tokens_are_added_as_transformers_does(tmp_path):
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
    config = {f"{role}_token": name for role, name in names.items()}
    config["mask_token"] = {"__type": "AddedToken", "content": "<hidden>", "lstrip": True, "special": True}
    folder = write_folder(tmp_path / "r", roberta_like(), **config)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1)
    hf = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(hf) == 261 and tokenizer.unpadded_vocab_size == 261
    for role in ("cls", "sep", "pad", "mask", "unk", "bos", "eos"):
        assert getattr(tokenizer, f"{role}_id") == getattr(hf, f"{role}_token_id")
    for text in [*TEXTS, "a <hidden> b"]:
        assert tokenizer.encode_prompt(text) == hf(text)["input_ids"]


def test_special_tokens_map_is_read_and_null_is_no_token(tmp_path):
    backend = roberta_like(["<mask>", "<gap>"])
    folder = write_folder(tmp_path / "r", backend, bos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<gap>"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_id == backend.token_to_id("<gap>") and tokenizer.bos_id is None
    assert tokenizer.cls_id == 0 and tokenizer.pad_id == 1  # by their usual names
    assert tokenizer.mask_id in tokenizer.special_ids


def test_a_bare_tokenizer_json_has_its_roles_by_the_usual_names(tmp_path):
    roberta_like(["<mask>"]).save(str(tmp_path / "any-name.json"))
    tokenizer = load_tokenizer(tmp_path / "any-name.json")
    found = (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.unk_id, tokenizer.mask_id)
    assert found == (0, 1, 2, 3, 260)


def test_limits_in_the_file_do_not_cut_documents(tmp_path):
    backend = roberta_like(["<mask>"])
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(write_folder(tmp_path / "r", backend))
    assert len(tokenizer.encode("x" * 100)) == 102 and len(tokenizer.encode("x")) == 3


def test_a_missing_mask_is_refused_with_the_remedy_and_the_remedy_works(tmp_path):
    folder = write_folder(tmp_path / "r", roberta_like())
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert error.value.code == "no_special_token" and "<s>, <pad>, </s>, <unk>" in str(error.value)
    assert '"mask_token": "[MASK]"' in error.value.hint
    assert load_tokenizer(folder, required=()).mask_id is None
    with pytest.raises(ValueError, match="msk"):
        load_tokenizer(folder, required=["msk"])
    write_folder(folder, roberta_like(), mask_token="[MASK]")
    assert load_tokenizer(folder).mask_id == 260


def test_vocab_txt_is_berts_tokenizer(tmp_path):
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz.,;'ü中",
        "the",
        "##e",
        "##r",
        "qu",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    for lowercase in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
        hf = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=lowercase)
        for path in (tmp_path, tmp_path / "vocab.txt"):
            ours = load_tokenizer(path)
            for text in [*TEXTS, "The qur. ü 中e", "a [MASK]"]:
                assert ours.encode_prompt(text) == hf(text)["input_ids"]
            assert ours.mask_id == 4 and ours.pad_id == 0


@pytest.mark.parametrize(
    ("files", "path", "code", "names"),
    [
        ({}, "nowhere", "no_tokenizer", ["nowhere"]),
        ({"readme.md": "x"}, "", "no_tokenizer", []),
        ({"vocab.json": "{}", "merges.txt": ""}, "", "no_tokenizer", ["vocab.json, merges.txt", "save_pretrained"]),
        ({"spiece.model": "x"}, "", "no_tokenizer", ["(spiece.model)", "/spiece.model itself"]),
        ({"tokenizer.json": '{"model": '}, "", "unreadable_tokenizer", ["tokenizer.json", "line 1"]),
        ({"tokenizer.json": "[]"}, "", "unreadable_tokenizer", ["tokenizer.json"]),
        ({"tokenizer.json": '{"added_tokens": []}'}, "", "unreadable_tokenizer", ["tokenizer.json"]),
        ({"tokenizer.json": "{}"}, "", "unreadable_tokenizer", ["tokenizer.json"]),
        ({"t.bin": "x"}, "t.bin", "no_tokenizer", ["t.bin"]),
        ({"vocab.txt": "a\nb\n"}, "", "unreadable_tokenizer", ["[UNK]"]),
        ({"vocab.txt": "[UNK]\na\nb\na\n"}, "", "duplicate_ids", ["'a' in lines 2 and 4"]),
    ],
)
def test_what_cannot_be_read_is_named(files, path, code, names, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / path)
    assert error.value.code == code and all(name in str(error.value) for name in names)


def test_a_folder_of_a_run_names_its_newest_checkpoint(tmp_path):
    for name in ("step-00000100", "step-00000300", "step-100000000", "step-200000000.tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "run")
    assert error.value.hint.endswith("/checkpoints/step-100000000")


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("gpt2", "hf download gpt2 --local-dir gpt2"),
        ("you/model", "hf download you/model --local-dir model"),
        ("runs/gpt2", ""),
        ("/nowhere/gpt2", ""),
        ("tokenizer.json", ""),
    ],
)
def test_a_name_of_the_hub_gets_the_command_that_fetches_it(path, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError) as found:
        load_tokenizer(path)
    assert ("hf download" in found.value.hint) == bool(remedy) and found.value.hint.endswith(remedy)


def test_a_broken_config_beside_it(tmp_path):
    folder = write_folder(tmp_path / "r", roberta_like(["<mask>"]))
    (folder / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert error.value.code == "unreadable_tokenizer" and "tokenizer_config.json" in str(error.value)


def test_vocabulary_padding_to_a_multiple_of_nothing(tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizer(write_folder(tmp_path / "r", roberta_like(["<mask>"])), pad_vocab_to_multiple_of=0)
    assert error.value.key == "pad_vocab_to_multiple_of"


def test_a_generator_cannot_be_read_twice():
    with pytest.raises(UserError) as error:
        train_wordpiece((Document("a b c", "x") for _ in range(3)), vocab_size=100)
    assert error.value.code == "no_documents"


# Ids never move


def test_a_token_added_by_transformers_keeps_its_id_after_the_padding(tmp_path):
    train_bpe(topics(), vocab_size=300, causal=True).save(tmp_path / "own")
    hf = AutoTokenizer.from_pretrained(tmp_path / "own")
    hf.add_tokens(["<ent>"])
    hf.add_special_tokens({"additional_special_tokens": ["<sep2>"]})
    hf.save_pretrained(tmp_path / "more")
    for multiple, size in ((1, 322), (64, 384)):
        tokenizer = load_tokenizer(tmp_path / "more", pad_vocab_to_multiple_of=multiple, causal=True)
        assert tokenizer.backend.token_to_id("<ent>") == hf.convert_tokens_to_ids("<ent>") == 320
        assert tokenizer.encode_prompt("the <ent> is <sep2>") == hf("the <ent> is <sep2>")["input_ids"]
        assert (tokenizer.unpadded_vocab_size, tokenizer.vocab_size) == (322, size)
        assert set(range(300, 320)) <= set(tokenizer.special_ids), "no text gives them and no mask is one of them"
        assert sorted(tokenizer.backend.get_vocab(True).values()) == list(range(size))
        tokenizer.save(tmp_path / f"again-{multiple}")
        again = load_tokenizer(tmp_path / f"again-{multiple}", pad_vocab_to_multiple_of=1, causal=True)
        assert again.backend.token_to_id("<ent>") == 320 and again.fingerprint == tokenizer.fingerprint


def holes(folder):
    words = "the cat dog house river run green blue".split()
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {word: 10 + 2 * i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return write_folder(folder, backend, mask_token="[MASK]")


def test_a_vocabulary_with_holes_is_loaded_exactly_or_refused(tmp_path):
    folder = holes(tmp_path / "holes")
    for arguments in ({}, {"pad_vocab_to_multiple_of": 1}):
        with pytest.raises(UserError) as error:
            load_tokenizer(folder, **arguments)
        assert error.value.code == "holes" and "4, 5, 6, 7, 8, 9, 11" in str(error.value)
    (folder / "tokenizer_config.json").unlink()
    exact = load_tokenizer(folder, required=(), pad_vocab_to_multiple_of=1)
    assert exact.encode_prompt("the blue") == [10, 24] and exact.vocab_size == 25


@pytest.mark.parametrize(
    ("added", "code"),
    [
        ({"id": 300, "content": "<far>"}, "moved_ids"),
        ({"id": 7, "content": "<double>"}, "duplicate_ids"),
        ({"id": 9, "content": "<s>"}, "moved_ids"),
    ],
)
def test_ids_that_tokenizers_would_change_are_refused(tmp_path, added, code):
    folder = write_folder(tmp_path / "r", roberta_like(["<mask>"]))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | added)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert error.value.code in (code, "duplicate_ids") and str(added["id"]) in str(error.value)


def test_a_byte_order_mark_in_a_vocabulary_is_skipped(tmp_path):
    lines = "[PAD] [UNK] [CLS] [SEP] [MASK] the".replace(" ", "\n")
    (tmp_path / "vocab.txt").write_bytes(f"\ufeff{lines}\n".encode())
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert load_tokenizer(tmp_path).pad_id == 0


# What else a folder holds


def test_a_chat_template_and_harmless_keys_are_kept(tmp_path):
    config = {"chat_template": "{{ messages }}", "padding_side": "left", "model_max_length": 77, "note": 1}
    config |= {"add_bos_token": True, "add_eos_token": True, "tokenizer_class": "BertTokenizer", "auto_map": {"a": "b"}}
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    folder = write_folder(tmp_path / "r", roberta_like(["<mask>"]), **config)
    (folder / "chat_template.jinja").write_text("{% for x in messages %}{{ x.content }}{% endfor %}")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    hf = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (hf.padding_side, hf.model_max_length) == ("left", 77)
    assert "token_type_ids" in hf("a", "b")
    assert hf("a b")["input_ids"] == tokenizer.encode_prompt("a b")
    kept = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert kept["note"] == 1 and not {"add_bos_token", "auto_map"} & set(kept)
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_tokenizer(tmp_path / "saved")
    assert again.config == tokenizer.config and again.chat_template == tokenizer.chat_template
    tokenizer.save(tmp_path / "saved", model_max_length=32)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 32
