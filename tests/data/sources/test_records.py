"""What of a record is its text, JSON arrays, separators, delimiters, chat messages, and the first documents."""

import gzip
import json
import pickle

import pytest

from torchrecipes.data.sources import files, hf_dataset, line_reader, text_files
from torchrecipes.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(source):
    return [document.text for document in source]


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        list(files(*arguments, **options))
    return error.value


# --- text_column


def test_a_nested_key_and_a_key_with_a_dot(here):
    rows = [{"data": {"text": "inner", "a.b": "dotted"}}, {"data.text": "wins", "data": {"text": "loses"}}]
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (here / "b.json").write_text(json.dumps(rows))
    assert texts(files(".", text_column="data.text")) == ["inner", "wins"] * 2
    assert texts(files(".", text_column="data.a.b", on_bad_record="skip")) == ["dotted"] * 2
    error = refused("a.jsonl", text_column="data.title")
    assert error.code == "bad_record" and "no key 'data.title'" in error.problem and "'data'" in error.problem


def test_records_with_one_fault_are_counted_and_others_are_listed(here):
    (here / "a.jsonl").write_text('{"body": "x"}\n' * 30)
    error = refused("a.jsonl")
    assert error.problem.startswith("a.jsonl:1: ") and "29 more" in error.problem and "\n" not in error.problem
    (here / "b.jsonl").write_text('{"text": 5}\n{"body": "x"}\n{"text": 6}\n')
    assert [line.partition(": ")[0] for line in refused("b.jsonl").problem.splitlines()] == [
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
    ]


def test_a_field_of_a_struct(here):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "one", "n": 1}, None, {"text": None, "n": 2}, {"text": "two", "n": 3}]
    table = pyarrow.table({"data": rows, "a.b": ["x"] * 4, "c.d": [{"e": "y"}] * 4})
    (here / "data").mkdir()
    parquet.write_table(table, "data/train.parquet")
    for make in (files, hf_dataset):
        source = make("data", text_column="data.text", on_bad_record="skip")
        assert texts(source) == ["one", "two"] and source.report.skipped == {"the text is null": 2}
        assert texts(make("data", text_column="a.b")) == ["x"] * 4
        assert texts(make("data", text_column="c.d.e")) == ["y"] * 4
    for column in ("data.title", "data", "data.n"):
        assert f"'{column}'" in refused("data", text_column=column).problem
    with pytest.raises(UserError) as error:
        hf_dataset("data", text_column="date.text")
    assert error.value.code == "no_such_column"


# --- JSON arrays


ROWS = [
    {"text": 'one "quoted" [not] {an} end\\', "n": [1, {"a": []}]},
    {"text": "zwei\nüber 日本"},
    {"text": "three"},
    17,
    {"text": None},
    {"body": "x"},
    {"n": "DIGITS", "text": "four"},
]
GOOD = ['one "quoted" [not] {an} end\\', "zwei\nüber 日本", "three", "four"]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("block", [4, 7, 1 << 20])
def test_a_file_may_be_one_array_of_objects(here, monkeypatch, indent, block):
    monkeypatch.setattr(line_reader, "BLOCK", block)
    monkeypatch.setattr(text_files, "BLOCK", block)
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False).replace('"DIGITS"', "9" * 5000)
    (here / "a.json").write_text("\ufeff \n" + text, encoding="utf-8")
    (here / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    source = files(".", on_bad_record="skip")
    found = list(source)
    assert [document.text for document in found] == GOOD * 2
    assert source.report.skipped == {"not a JSON object": 2, "the text is null": 2, "no key 'text'": 2}
    if indent == 0:
        lines = ("\ufeff \n" + text).split("\n")
        for document in found[:4]:
            assert lines[int(document.source.split(":")[1]) - 1] == "{"
    for number in range(9):
        iterator = source.read()
        for _ in range(number):
            next(iterator, None)
        assert list(files(".", on_bad_record="skip").read(source.position())) == found[number:]


def test_an_array_of_any_size_takes_constant_memory_and_is_read_from_its_middle(here):
    import tracemalloc

    with open("a.json", "w") as file:
        file.write("[")
        for number in range(30_000):
            file.write(("," if number else "") + json.dumps({"id": number, "text": f"some words {number} " * 60}))
        file.write("]")
    source = files("a.json")
    tracemalloc.start()
    count = sum(1 for _ in source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000 and (here / "a.json").stat().st_size > 25_000_000 > 10_000_000 > peak
    iterator = source.read()
    for _ in range(20_000):
        next(iterator)
    position = source.position()
    assert position["byte"] > 15_000_000
    assert next(source.read(position)) == next(iterator)


@pytest.mark.parametrize(
    "content, good, line, reason",
    [
        (b'[{"text": "a"},\n{"text": "b"\n', 1, 3, "not JSON"),
        (b'[{"text": "a"},\n{"text": "b"}', 2, 2, "not JSON"),
        (b'[{"text": "a"},\n{"text": oops},\n{"text": "c"}]', 1, 2, "not JSON"),
        (b'[{"text": "a"},\n{"text": "cut', 1, 2, "not JSON"),
        (b'[{"text": "a"}]\n\n[{"text": "b"}]', 1, 3, "not JSON"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', 1, 2, "not UTF-8"),
        (b'[{"text": "a"},\n{"n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]", 1, 2, "nested too deeply"),
    ],
)
def test_a_damaged_array_gives_what_is_before_the_damage(here, content, good, line, reason):
    (here / "a.json").write_bytes(content)
    assert refused("a.json").problem.startswith(f"a.json:{line}: {reason}")
    source = files("a.json", on_bad_record="skip")
    assert len(list(source)) == good and source.report.skipped == {reason: 1}


def test_lines_that_are_arrays_are_no_array_of_objects(here):
    (here / "a.jsonl").write_text('["a", "b"]\n{"text": "x"}\n')
    source = files("a.jsonl", on_bad_record="skip")
    assert texts(source) == ["x"] and source.report.skipped == {"not a JSON object": 1}


# --- separators and delimiters


@pytest.mark.parametrize(
    "content",
    [
        "one\nline two<|endoftext|>second<|endoftext|>third",
        "one\nline two\n<|endoftext|>\nsecond\n<|endoftext|>\nthird\n<|endoftext|>\n",
        "<|endoftext|>\n\none\r\nline two\r\n\r\n<|endoftext|>second\n<|endoftext|><|endoftext|>\n  \n"
        "<|endoftext|>third\n\n",
    ],
)
def test_documents_between_separators(here, monkeypatch, content):
    (here / "a.txt").write_bytes(content.encode())
    for block in (4, 9, 1 << 20):
        monkeypatch.setattr(line_reader, "BLOCK", block)
        monkeypatch.setattr(text_files, "BLOCK", block)
        found = list(files("a.txt", separator="<|endoftext|>"))
        assert [document.text for document in found] == ["one\nline two", "second", "third"]
        number = found[0].source.split(":")[1]
        assert content.split("\n")[int(number) - 1].rstrip().endswith(("one", "two"))


def test_a_separator_that_is_a_line_of_its_own(here):
    (here / "a.txt").write_text("a --- b\n---\nc\n----\n---")
    assert texts(files("a.txt", separator="---")) == ["a ", " b", "c", "-"]
    assert texts(files("a.txt", separator="\n---\n")) == ["a --- b", "c\n----"]
    assert texts(files("a.txt", separator="---\n")) == ["a --- b", "c\n----"]


def test_separators_in_a_text_larger_than_memory(here):
    """One line, whose documents are longer and shorter than what is read at a time; none is cut at another place."""
    import tracemalloc

    wanted = [f"wörter {number} " * (300_000 if number % 5 == 1 else 3) for number in range(40)]
    (here / "a.txt").write_text("<|endoftext|>".join(wanted))
    tracemalloc.start()
    found, joined = files("a.txt", separator="<|endoftext|>"), []
    for document in found:
        if "piece" in document.source:
            joined[-1] += document.text
        else:
            joined.append(document.text)
    tracemalloc.stop()
    assert joined == wanted


def test_a_bad_byte_takes_its_document_with_it(here):
    (here / "a.txt").write_bytes("gut über<|>bad ".encode() + b"\xff\nmore<|>last")
    source = files("a.txt", separator="<|>", on_bad_record="skip")
    assert texts(source) == ["gut über", "last"] and source.report.skipped == {"not UTF-8": 1}


def test_separators_that_say_nothing_are_refused(here):
    (here / "a.txt").write_text("x")
    for separator in ("", "\n\n", "a\nb", "x" * 101):
        assert refused("a.txt", separator=separator).key == "separator"
    assert refused("a.txt", separator="x", sample_by="line").key == "separator"


def test_a_delimiter_of_csv(here):
    (here / "a.csv").write_text('n;text\n1;"one; two"\n2;three, four\n')
    assert texts(files("a.csv", delimiter=";")) == ["one; two", "three, four"]
    (here / "b.csv").write_text('n|text\n1|x "y"\n')
    assert "delimiter" in refused("a.csv").problem and "'|'" in refused("b.csv").problem
    (here / "c.csv").write_text('n\ttext\n1\t"x"\n')
    for tab in ("\t", "\\t"):
        assert texts(files("c.csv", delimiter=tab)) == ['"x"']
    for delimiter in ("", ";;", '"', "\n"):
        assert refused("a.csv", delimiter=delimiter).key == "delimiter"


def test_the_first_documents_are_counted_across_files_and_positions(here):
    for name in "abc":
        (here / f"{name}.txt").write_text("\n".join(f"{name}{number}" for number in range(4)))
    source = files(".", sample_by="line", max_documents=6)
    assert texts(source) == ["a0", "a1", "a2", "a3", "b0", "b1"] and source.report.documents == 6
    assert source.fingerprint != files(".", sample_by="line").fingerprint
    iterator = source.read()
    for _ in range(5):
        next(iterator)
    assert texts(source.read(source.position())) == ["b1"]
    assert texts(source.read(source.position())) == []
    assert refused(".", max_documents=0).key == "max_documents"


# --- chat messages

CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Grüße <b>"}]
RENDERED = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nGrüße <b><|im_end|>\n"


@pytest.fixture
def model(here):
    (here / "model").mkdir()
    (here / "model/tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (here / "model/chat_template.jinja").write_text(CHATML)
    return "model"


def test_messages_are_rendered_in_every_format(here, model):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (here / "data").mkdir()
    (here / "data/a.jsonl").write_text(json.dumps({"chat": CHAT}) + "\n" + json.dumps({"chat": json.dumps(CHAT)}))
    (here / "data/b.json").write_text(json.dumps([{"chat": CHAT}], indent=1))
    parquet.write_table(pyarrow.table({"chat": [CHAT]}), "data/c.parquet")
    source = files("data", messages_column="chat", chat_template=model)
    assert texts(source) == [RENDERED] * 4
    assert texts(pickle.loads(pickle.dumps(source))) == [RENDERED] * 4
    assert texts(files("data", messages_column="chat", chat_template="model/chat_template.jinja")) == [RENDERED] * 4
    before = source.fingerprint
    for name in ("a.jsonl", "b.json"):
        (here / "data" / name).rename(here / name)
    for streaming in (False, True):
        options = {"messages_column": "chat", "chat_template": model, "streaming": streaming}
        assert texts(hf_dataset("data", **options)) == [RENDERED]
    for name in ("a.jsonl", "b.json"):
        (here / name).rename(here / "data" / name)
    assert files("data", messages_column="chat", chat_template=model).fingerprint == before
    (here / "model/chat_template.jinja").write_text(CHATML + "!")
    assert files("data", messages_column="chat", chat_template=model).fingerprint != before


def test_templates_render_what_transformers_renders(here, model):
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    assert transformers
    hard = (
        "{%- set ns = namespace(n=0) -%}\n  {%- for m in messages if m.role != 'system' %}\n{{ m | tojson }}\n"
        "{%- if loop.index > 5 %}{% break %}{% endif %}\n{%- set ns.n = ns.n + 1 %}\n{%- endfor %}\n"
        "{{ ns.n }} {{ eos_token }}\n"
    )
    (here / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    for template in (CHATML, hard):
        (here / "model/chat_template.jinja").write_text(template)
        wanted, _ = render_jinja_template([CHAT], chat_template=template, bos_token="<s>")
        found = texts(files("a.jsonl", messages_column="messages", chat_template=model))
        assert found == [wanted[0].removeprefix("<s>")]


def test_messages_that_are_none_are_named(here, model):
    bad = [17, "no list", [], ["x"], [{"content": "x"}], [{"from": "human", "value": "x"}], None]
    (here / "a.jsonl").write_text("\n".join(json.dumps({"chat": value}) for value in [CHAT, *bad]))
    source = files("a.jsonl", messages_column="chat", chat_template=model, on_bad_record="skip")
    assert texts(source) == [RENDERED] and sum(source.report.skipped.values()) == len(bad)
    assert any("'from', 'value'" in example for example in source.report.examples["a message without a role"])
    (here / "model/chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    error = refused("a.jsonl", messages_column="chat", chat_template=model)
    assert error.code == "bad_record" and "a.jsonl:1" in error.problem and "roles must alternate" in error.problem


@pytest.mark.parametrize(
    "attack", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__ }}"]
)
def test_a_template_reaches_nothing(here, model, attack):
    (here / "model/chat_template.jinja").write_text(attack)
    (here / "a.jsonl").write_text(json.dumps({"chat": CHAT}))
    source = files("a.jsonl", messages_column="chat", chat_template=model, on_bad_record="skip")
    assert not any("class" in text or "function" in text for text in texts(source))


def test_templates_in_other_places_and_no_template(here, model):
    (here / "a.jsonl").write_text(json.dumps({"chat": CHAT}))
    (here / "model/chat_template.jinja").unlink()
    options = {"messages_column": "chat", "chat_template": "model"}
    assert refused("a.jsonl", **options).code == "no_chat_template"
    for stated in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (here / "model/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": stated}))
        assert texts(files("a.jsonl", **options)) == [RENDERED]
    (here / "model/chat_template.jinja").write_text("{% for %}")
    assert refused("a.jsonl", **options).code == "bad_chat_template"
    assert refused("a.jsonl", messages_column="chat").key == "chat_template"
    assert refused("a.jsonl", chat_template="model").key == "messages_column"
    assert refused("a.jsonl", messages_column="chat", chat_template="nowhere").code == "no_chat_template"
