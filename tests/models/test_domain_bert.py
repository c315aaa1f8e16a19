import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from torchrecipes.models import bert, domain_bert, hf_state_dict, load_hf, meta_model_from_hf, save_hf

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "num_suffixes": 7,
    "suffix_embedding_size": 5,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose logits are of order 1, and its folder."""
    model = domain_bert(**SIZES, initializer_range=0.2, seed=3).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # or exchanging biases and norms would not show
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("domain_bert")
    save_hf(model, folder)
    return model, folder


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 43, (3, 20), generator=generator), torch.randint(0, 28, (3, 20), generator=generator)


def test_the_parameters_are_those_of_the_formula():
    with torch.device("meta"):
        model = domain_bert("base")
    width, inner, layers, suffixes, size = 768, 3072, 12, 513, 64
    embeddings = (43 + 64 + 4) * width + suffixes * size + (size + 1) * width + 2 * width
    attention, mlp = 4 * (width + 1) * width, (width + 1) * inner + (inner + 1) * width
    transform = (width + 1) * width + 2 * width
    document_head = (width + 1) * width + (width + 1) * suffixes
    expected = embeddings + layers * (attention + mlp + 4 * width) + transform + 43 + document_head
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 86_801_260


def test_the_embedding_is_the_sum_of_its_parts(saved):
    model, _ = saved
    ids, types = inputs()
    embedding, table = model.embedding, model.embedding.token_type_embeddings
    expected = embedding.word_embeddings(ids) + embedding.position_embeddings(torch.arange(20))
    expected = expected + table.types(types % 4) + table.projection(table.groups(types // 4))
    assert torch.allclose(embedding(ids, torch.arange(20)[None], types), embedding.norm(expected), atol=1e-6)


@pytest.mark.parametrize("typed", [True, False])
def test_transformers_computes_the_same(saved, typed):
    model, folder = saved
    ids, types = inputs()
    types = types if typed else None
    hidden = model(ids, token_type_ids=types)
    theirs, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    logits = theirs.eval()(input_ids=ids, token_type_ids=types).logits
    assert logits.std() > 0.3
    assert (logits - model.head(hidden)).abs().max() <= 1e-5
    theirs, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    outputs = theirs.eval()(input_ids=ids, token_type_ids=types)
    assert (outputs.last_hidden_state - hidden).abs().max() <= 1e-5
    pooled = torch.tanh(model.document_head.dense(hidden[:, 0]))
    assert (outputs.pooler_output - pooled).abs().max() <= 1e-5


def test_a_folder_gives_every_bit_back(saved):
    model, folder = saved
    loaded = load_hf(folder, report=pytest.fail)
    expected = model.state_dict()
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_without_the_second_file_it_is_a_bert(saved, tmp_path):
    model, folder = saved
    save_hf(model, tmp_path)
    (tmp_path / "domain_bert" / "model.safetensors").unlink()
    reports = []
    loaded = load_hf(tmp_path, report=reports.append).eval()
    assert "domain_bert/model.safetensors" in reports[0]
    assert loaded.config == load_hf_config(folder)
    ids, types = inputs()
    hidden = loaded(ids, token_type_ids=types)
    assert (hidden - model(ids, token_type_ids=types)).abs().max() <= 1e-5
    assert (loaded.head(hidden) - model.head(hidden)).abs().max() <= 1e-5
    load_hf(tmp_path, head=False, report=lambda line: pytest.fail(line) if "domain_bert" in line else None)


def load_hf_config(folder):
    return meta_model_from_hf(folder, head=False).config


def test_without_its_heads_it_is_a_bert(saved):
    model, folder = saved
    ids, types = inputs()
    for encoder in (load_hf(folder, head=False, report=lambda line: None).eval(), load_hf(folder).eval()):
        if encoder.head is not None:
            encoder.remove_head()
        assert encoder.document_head is None
        with torch.device("meta"):
            expected = bert(vocab_size=43, type_vocab_size=28, **dict(list(SIZES.items())[:5]))
        expected.remove_head()
        assert {name: tensor.shape for name, tensor in encoder.state_dict().items()} == {
            name: tensor.shape for name, tensor in expected.state_dict().items()
        }
        assert encoder.config.type_vocab_size == 28
        assert hf_state_dict(encoder)["embeddings.token_type_embeddings.weight"].shape == (28, 32)
        assert (encoder(ids, token_type_ids=types) - model(ids, token_type_ids=types)).abs().max() <= 1e-5
