import pytest
import torch
import torch.nn.functional as F

from torchrecipes.models import EmbeddingModel, bert, neobert
from torchrecipes.modules import GeluMLP, pack_linears


@pytest.mark.parametrize("build", [bert, neobert])
def test_a_packed_model_gives_the_same_embeddings(build):
    model = EmbeddingModel(build("tiny", vocab_size=50), projection=7).eval()
    ids = torch.randint(50, (3, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        if not pack_linears(model):
            pytest.skip("this PyTorch has no oneDNN")
        found = model(ids)
        assert (found - expected).abs().max() <= 1e-5
        names = set(model.state_dict())
        assert "encoder.blocks.0.self_attn.qkv_proj.weight" in names and len(names) == len(list(model.parameters()))
        model.encoder.blocks[0].self_attn.qkv_proj.weight.zero_()  # it has been copied
        assert torch.equal(model(ids), found)


@pytest.mark.parametrize("build", [bert, neobert])
def test_in_bf16_it_is_what_autocast_computes(build):
    model = EmbeddingModel(build("tiny", vocab_size=50), projection=7).eval()
    ids = torch.randint(50, (3, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
        if not pack_linears(model, torch.bfloat16):
            pytest.skip("this CPU has no instructions for bf16")
        assert (model(ids) - expected).abs().max() <= 1e-2  # embeddings of length 1, eight bits of mantissa


def test_the_approximation_of_gelu_is_kept():
    mlp = GeluMLP(8, 16, approximate="tanh")
    x = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mlp.down_proj(F.gelu(mlp.up_proj(x), approximate="tanh"))
        if not pack_linears(mlp):
            pytest.skip("this PyTorch has no oneDNN")
        assert (mlp(x) - expected).abs().max() <= 1e-6
        assert (mlp(x) - mlp.down_proj(F.gelu(mlp.up_proj(x)))).abs().max() > 1e-6
