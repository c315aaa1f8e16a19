import pytest
import torch

from torchrecipes.models import EmbeddingModel, bert, neobert
from torchrecipes.modules import pack_linears


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
