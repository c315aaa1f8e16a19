"""Classifiers against `AutoModelForSequenceClassification`: logits and gradients, in both directions."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EuroBertConfig,
    EuroBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from torchrecipes.models import (
    SequenceClassifier,
    bert,
    distilbert,
    hf_state_dict,
    load_classifier,
    modernbert,
    neobert,
    roberta,
    save_hf,
)

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# Weights five times as large as usual, so that logits are of order 1 and errors show.
SIZES |= {"intermediate_size": 80, "max_position_embeddings": 64, "initializer_range": 0.1}
DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
DISTILBERT |= {"intermediate_size": "hidden_dim"}
IDS = {f"{kind}_token_id": None for kind in ("pad", "bos", "eos", "cls", "sep")}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
CASES = {  # our builder and its arguments, our pooling; their class, its config, and its arguments
    "bert": (bert, {}, "cls", BertForSequenceClassification, BertConfig, {}),
    "roberta": (
        roberta,
        {"pad_token_id": 3},
        "cls",
        RobertaForSequenceClassification,
        RobertaConfig,
        {"pad_token_id": 3},
    ),
    "xlm-roberta": (
        roberta,
        {"model_type": "xlm-roberta"},
        "cls",
        XLMRobertaForSequenceClassification,
        XLMRobertaConfig,
        {},
    ),
    "distilbert": (distilbert, {}, "cls", DistilBertForSequenceClassification, DistilBertConfig, {}),
    "modernbert-cls": (modernbert, {}, "cls", ModernBertForSequenceClassification, ModernBertConfig, IDS),
    "modernbert-mean": (
        modernbert,
        BIASES,
        "mean",
        ModernBertForSequenceClassification,
        ModernBertConfig,
        IDS | BIASES | {"classifier_pooling": "mean"},
    ),
    **{
        f"neobert-{ours}": (
            neobert,
            {},
            ours,
            EuroBertForSequenceClassification,
            EuroBertConfig,
            IDS | {"mask_token_id": 4, "classifier_pooling": theirs},
        )
        for ours, theirs in (("mean", "mean"), ("cls", "bos"), ("late", "late"))
    },
}
LENGTHS = [17, 30, 5]
NAMES = ["bad", "good", "so so"]


def their_model(case, **changes):
    _, _, _, model_class, config_class, arguments = CASES[case]
    keys = SIZES | {"num_labels": 3, "classifier_dropout": 0.3} | arguments | changes
    if case == "distilbert":
        keys = {DISTILBERT.get(key, key): value for key, value in keys.items()}
    if case.startswith("neobert"):
        del keys["classifier_dropout"]
    config = config_class(**keys)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    torch.manual_seed(0)
    return randomize(model_class(config).eval())


def our_model(case):
    builder, arguments, pooling = CASES[case][:3]
    encoder = builder(**SIZES | arguments)
    return randomize(SequenceClassifier(encoder, label_names=NAMES, pooling=pooling, dropout=0.3)).eval()


def randomize(model):
    """Biases and norms away from 0 and 1, or exchanging them would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2, generator=generator)
    return model


def texts(pad=0):
    """A padded batch with its mask, and the same texts in one row with padding at its end."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(4, 101, (3, 30), generator=generator)
    mask = torch.arange(30)[None] < torch.tensor(LENGTHS)[:, None]
    row = torch.cat((rows[mask], torch.full((12,), pad)))[None]
    ends = torch.tensor([0, *LENGTHS, 12]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in (*LENGTHS, 12)])[None]
    packed = {"position_ids": positions, "cu_seqlens": ends, "max_seqlen": 30, "num_texts": 3}
    return rows.masked_fill(~mask, pad), mask, row, packed


def assert_same(ours, theirs, types=False):
    rows, mask, row, packed = texts(getattr(theirs.config, "pad_token_id", None) or 0)
    inputs = {"input_ids": rows, "attention_mask": mask.long()}
    if types:
        inputs["token_type_ids"] = (torch.arange(30)[None] >= torch.tensor([9, 20, 2])[:, None]).long().expand(3, 30)
        packed["token_type_ids"] = F.pad(inputs["token_type_ids"][mask], (0, 12))[None]
    logits, expected = ours(row, **packed), theirs(**inputs).logits
    assert expected.std() > 0.05
    assert (logits - expected).abs().max() <= 1e-5
    for model, scores in ((ours, logits), (theirs, expected)):
        model.zero_grad()
        F.cross_entropy(scores, torch.tensor([2, 0, 1])).backward()
    gradients = hf_state_dict(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(gradients) == set(their_gradients)
    for name, gradient in gradients.items():
        found = their_gradients[name]
        assert (gradient - found).abs().max() <= 1e-5 * max(1, found.abs().max()), name


@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(tmp_path, case):
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    ours = load_classifier(tmp_path, report=pytest.fail)
    assert ours.label_names == tuple(NAMES) and ours.labels.task == "single_label"
    assert ours.pooling == CASES[case][2]
    if not case.startswith("neobert"):
        assert ours.head.dropout_p == (0.2 if case == "distilbert" else 0.3)
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_there(tmp_path, case):
    ours = our_model(case)
    ours.calibrate(temperature=1.5)
    save_hf(ours, tmp_path)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is CASES[case][3]
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.label2id["so so"] == 2
    assert theirs.config.problem_type == "single_label_classification"
    assert_same(ours, theirs.eval())
    theirs.save_pretrained(tmp_path / "again")  # keeps what it does not know
    assert load_classifier(tmp_path / "again").labels == ours.labels


def test_token_types(tmp_path):
    theirs = their_model("bert")
    theirs.save_pretrained(tmp_path)
    assert_same(load_classifier(tmp_path, report=pytest.fail), theirs, types=True)


@pytest.mark.parametrize("case", CASES)
def test_rows_without_packing(tmp_path, case):
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    rows = texts()[0].clamp(min=4)
    with torch.no_grad():
        logits = load_classifier(tmp_path)(rows)
        assert (logits - theirs(input_ids=rows).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "modernbert-mean"])
def test_dropout_is_where_theirs_is(tmp_path, case):
    """Logits spread alike over many masks only if dropout has the same places and rates."""
    key = "seq_classif_dropout" if case == "distilbert" else "classifier_dropout"
    theirs = their_model(case, **{key: 0.4})
    theirs.save_pretrained(tmp_path)
    ours = load_classifier(tmp_path)
    assert ours.head.dropout_p == 0.4
    ours.head.train()
    rows = texts()[0].clamp(min=4)
    torch.manual_seed(0)
    with torch.no_grad():
        features = ours(rows, return_features=True)
        mine = torch.stack([ours(features=features) for _ in range(4000)])
        body = theirs.base_model(input_ids=rows)
        for module in theirs.children():
            module.train(module is not theirs.base_model)
        head = {
            "bert": lambda: theirs.classifier(theirs.dropout(body.pooler_output)),
            "roberta": lambda: theirs.classifier(body.last_hidden_state),
            "distilbert": lambda: theirs.classifier(
                theirs.dropout(F.relu(theirs.pre_classifier(body.last_hidden_state[:, 0])))
            ),
            "modernbert-mean": lambda: theirs.classifier(theirs.drop(theirs.head(body.last_hidden_state.mean(1)))),
        }[case]
        expected = torch.stack([head() for _ in range(4000)])
    assert mine.std(0).min() > 0.01
    assert torch.allclose(mine.std(0), expected.std(0), rtol=0.06)
