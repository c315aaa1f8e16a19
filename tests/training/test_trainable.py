import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.models import SequenceClassifier, bert, modernbert, neobert
from torchrecipes.training import set_trainable

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 40}
IDS = torch.randint(0, 64, (6, 11), generator=torch.Generator().manual_seed(0))


def classifier(builder=bert, **changes):
    return SequenceClassifier(builder(**SIZES | changes), num_labels=3)


def trained_parts(model):
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {".".join(name.split(".")[: 3 if ".blocks." in name else 2]).removeprefix("encoder.") for name in names}


HEAD = {"head.dense", "head.out_proj"}


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("classifier", set()),
        ("last_2", {"blocks.3", "norm"}),
        ("last_3", {"blocks.2", "blocks.3", "norm"}),
        ("all", {"embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm"}),
    ],
)
@pytest.mark.parametrize("builder", [bert, neobert, modernbert])
def test_what_is_trained(builder, trainable, parts):
    if builder is bert:
        parts = parts - {"norm"}
    head = HEAD | ({"head.norm"} if builder is modernbert else set())
    model = classifier(builder)
    sentence = set_trainable(model, trainable)
    assert trained_parts(model) == head | parts
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"{trained:,}" in sentence
    set_trainable(model, "all")
    set_trainable(model, trainable)  # whatever was trained before
    assert trained_parts(model) == head | parts


@pytest.mark.parametrize(("trainable", "first"), [("classifier", 4), ("last_2", 3), ("last_3", 2)])
def test_frozen_parts_have_no_backward_pass_and_no_dropout(trainable, first):
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = classifier(**dropout)
    set_trainable(model, trainable)
    model.train()
    states = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: states.append(out))
    losses = [model(IDS)[:, 0].sum() for _ in range(2)]
    for number, (one, two) in enumerate(zip(states[:4], states[4:], strict=True)):
        assert one.requires_grad == (number >= first)
        assert torch.equal(one, two) == (number < first)
    losses[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    set_trainable(model, "all")
    states.clear()
    model(IDS), model(IDS)
    assert not torch.equal(states[0], states[4])
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_the_optimizer_has_the_trained_parameters_only():
    from torchrecipes.optim import adamw

    model = classifier()
    set_trainable(model, "last_2")
    optimizer = adamw(model)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora():
    lora = pytest.importorskip("torchrecipes.modules.lora")
    model = classifier()
    with pytest.raises(UserError) as error:
        set_trainable(model, "lora")
    assert error.value.code == "no_lora"
    lora.apply_lora(model, rank=2)
    set_trainable(model, "lora")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        name for name, _ in model.named_parameters() if name.startswith("head.")
    }
    assert sum("lora_A" in name for name in trained) >= 4


@pytest.mark.parametrize(("trainable", "code"), [("last_5", "unknown_name"), ("last_3", "too_few_blocks")])
def test_what_cannot_be_trained(trainable, code):
    with pytest.raises(UserError) as error:
        set_trainable(classifier(num_hidden_layers=1), trainable)
    assert error.value.code == code and error.value.key == "trainable"
