import json

from torchrecipes.errors import UserError


def test_a_message_has_key_problem_and_hint():
    assert str(UserError("it is wrong", key="a.b", hint="Change it.")) == "a.b: it is wrong. Change it."
    assert str(UserError("is it?", hint="Yes")) == "is it? Yes"
    assert str(UserError("these:\n  a\n  b", hint="Change them.")) == "these:\n  a\n  b\nChange them."


def test_the_fields_survive_a_key_in_front():
    error = UserError("it is wrong", key="lr", hint="Change it.", code="wrong").under("optimizer")
    assert (error.key, error.hint, error.code) == ("optimizer.lr", "Change it.", "wrong")


def test_a_mistake_keeps_its_fields_between_processes():
    listed = UserError("2 problems", code="invalid_config", problems=[UserError("is 0", key="lr", hint="Give more.")])
    again = UserError.from_dict(json.loads(json.dumps(listed.to_dict())))
    assert again.to_dict() == listed.to_dict() and again.problems[0].key == "lr" and str(again) == str(listed)
