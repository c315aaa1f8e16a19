"""The learners' ladder: sizes as described, and steps that compare."""

import dataclasses
import itertools

import pytest
import torch

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.models import bert

# Layers, width, heads, vocabulary, positions, and the parameters of a BERT encoder with a pooler, without token types.
PUBLISHED = {
    "ladder-v0": (2, 4, 2, 10_005, 128, 41_048),
    "ladder-v2": (4, 8, 4, 10_005, 128, 84_640),
    "ladder-v3": (6, 16, 8, 10_005, 128, 182_112),
    "ladder-v4": (8, 256, 8, 25_005, 256, 12_851_200),
}
STEPS = [f"ladder/v{number}" for number in range(5)]


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_those_of_the_table(size):
    layers, width, heads, vocabulary, positions, parameters = PUBLISHED[size]
    with torch.device("meta"):
        model = bert(size)
    keys = [("num_hidden_layers", layers), ("num_attention_heads", heads), ("max_position_embeddings", positions)]
    for key, value in [*keys, ("hidden_size", width), ("vocab_size", vocabulary)]:
        assert getattr(model.config, key) == value
    pooler, token_types = width * width + width, model.config.type_vocab_size * width
    encoder = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    assert encoder + pooler - token_types == parameters


def test_steps_train_on_the_same_text_and_differ_in_what_the_page_says():
    schema = load_recipe(find_recipe("mlm_pretrain")).Config
    configs = [load(schema, step) for step in STEPS]
    assert all(config.data == configs[0].data and config.tokenizer == configs[0].tokenizer for config in configs)
    differing = [
        {field.name for field in dataclasses.fields(schema) if getattr(a, field.name) != getattr(b, field.name)}
        for a, b in itertools.pairwise(configs)
    ]
    assert differing[0] == {"output_dir", "compute"}
    assert differing[1] == {"output_dir", "model", "optimizer"}
    assert differing[2] == {"output_dir", "model", "micro_batch_size"}
    assert "model" in differing[3] and "seq_len" in differing[3]
