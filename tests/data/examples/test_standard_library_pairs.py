import ast

import pytest

from torchrecipes.data.examples import docstring_code_pairs
from torchrecipes.errors import UserError


def test_functions_of_the_library_are_pairs_in_two_parts():
    train, test = list(docstring_code_pairs("train")), list(docstring_code_pairs("test"))
    assert len(train) > 1000 and 0.05 < len(test) / len(train) < 0.2
    queries = [example.texts[0] for example in [*train, *test]]
    code = [example.texts[1] for example in [*train, *test]]
    assert len(set(queries)) == len(queries) and len(set(code)) == len(code)
    for example in train[::200]:
        function = ast.parse(example.texts[1]).body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
    everything = docstring_code_pairs("all")
    assert len(list(everything)) == len(queries)
    assert len({docstring_code_pairs(part).fingerprint for part in ("train", "test", "all")}) == 3


def test_reading_continues_at_a_position():
    source = docstring_code_pairs("test")
    reader = source.read()
    first = [next(reader) for _ in range(5)]
    position = source.position()
    rest = list(reader)
    assert list(docstring_code_pairs("test").read(position)) == rest and len(first) == 5


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError) as error:
        docstring_code_pairs("dev")
    assert (error.value.key, error.value.code) == ("part", "invalid_value")
