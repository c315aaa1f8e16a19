import copy
import pickle

from torchrecipes.errors import UserError


def test_a_message_has_key_problem_and_hint():
    assert str(UserError("it is wrong", key="a.b", hint="Change it.")) == "a.b: it is wrong. Change it."
    assert str(UserError("is it?", hint="Yes")) == "is it? Yes"
    assert str(UserError("these:\n  a\n  b", hint="Change them.")) == "these:\n  a\n  b\nChange them."


def test_the_fields_survive_a_key_in_front_and_the_way_to_another_process():
    inner = UserError("one", key="x")
    error = UserError("it is wrong", key="lr", hint="Change it.", code="wrong", problems=[inner])
    assert (error.under("optimizer").key, error.under("optimizer").code) == ("optimizer.lr", "wrong")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == str(error)
        assert (other.key, other.hint, other.code) == (error.key, error.hint, error.code)
        assert [str(problem) for problem in other.problems] == ["x: one"]
