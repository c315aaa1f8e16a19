import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import ranks
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.errors import UserError
from torchrecipes.models import load_hf, neobert
from torchrecipes.training.ema import EMA

IDS = torch.arange(24).view(2, 12)


def small(seed=0):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return neobert(vocab_size=64, **sizes, seed=seed)


def train(model, optimizer, ema, steps):
    for step in range(steps):
        model.head(model(IDS + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


def make(seed=0, **options):
    model = small(seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), EMA(model, **options)


def resumable(folder, model, optimizer, ema):
    options = CheckpointConfig(async_save=False)
    return Checkpointer(folder, options, model=model, optimizer=optimizer, state={"ema": ema})


def logits(model):
    with torch.no_grad():
        return model.head(model(IDS))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_a_float64_loop(warmup):
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.9, warmup=warmup)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for update in range(1, 61):
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(generator=torch.Generator().manual_seed(update))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update)) if warmup else 0.9
        for name, weight in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
    for name, average in ema.averages.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)


def test_without_warmup_it_is_the_closed_form():
    model = nn.Linear(1, 1, bias=False)
    first = model.weight.item()
    ema = EMA(model, decay=0.75, warmup=False)
    with torch.no_grad():
        model.weight.fill_(3.0)
    for _ in range(10):
        ema.update()
    assert ema.averages["weight"].item() == pytest.approx(3 + 0.75**10 * (first - 3), rel=1e-6)


def test_weights_of_16_bits_are_averaged_in_32():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.999, warmup=False)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):  # each update is less than bf16 can tell from nothing
        ema.update()
    assert ema.averages["weight"].item() == pytest.approx(2 - 0.999**100, rel=1e-5)
    with ema.averaged():
        assert model.weight.dtype == torch.bfloat16 and model.weight.item() == 1.09375  # 1.0952 in bf16
    assert model.weight.item() == 2.0 and ema.exported_weights()["weight"].dtype == torch.bfloat16


def test_the_model_has_the_averages_inside_and_its_own_weights_after():
    model, optimizer, ema = make(decay=0.5)
    train(model, optimizer, ema, 3)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in ema.averages.items()}

    def holds(state):
        return all(torch.equal(weight, state[name]) for name, weight in model.named_parameters())

    with ema.averaged() as inside:
        assert inside is model and holds(averages) and not holds(own)
    assert holds(own)
    with pytest.raises(RuntimeError), ema.averaged():
        raise RuntimeError
    assert holds(own)
    assert all(torch.equal(average, averages[name]) for name, average in ema.averages.items())


def test_frozen_weights_are_not_averaged_and_tied_ones_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "frozen": nn.Linear(3, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    model["frozen"].requires_grad_(False)
    ema = EMA(model, decay=0.0, warmup=False)
    assert ema.averages.keys() == {"embedding.weight", "head.bias"}
    with torch.no_grad():
        model["head"].weight.add_(1)
        ema.averages["embedding.weight"].fill_(7)
        exported = ema.exported_weights()
    assert exported.keys() == model.state_dict().keys()
    assert (exported["embedding.weight"] == 7).all() and (exported["head.weight"] == 7).all()
    assert torch.equal(exported["frozen.weight"], model["frozen"].weight)


def test_a_resumed_average_is_the_same_to_the_last_bit(tmp_path):
    model, optimizer, ema = make(decay=0.9)
    train(model, optimizer, ema, 3)
    resumable(tmp_path, model, optimizer, ema).save(3)
    train(model, optimizer, ema, 2)
    other_model, other_optimizer, other = make(seed=5, decay=0.9)
    assert resumable(tmp_path, other_model, other_optimizer, other).resume() == 3
    assert other.updates == 3
    train(other_model, other_optimizer, other, 2)
    for name, average in ema.averages.items():
        assert torch.equal(other.averages[name], average), name


def test_averages_of_other_parameters_are_refused():
    _, _, ema = make()
    model = small()
    model.embedding.requires_grad_(False)
    with pytest.raises(UserError) as error:
        EMA(model).load_state_dict(ema.state_dict())
    assert error.value.code == "other_model" and "embedding.weight" in str(error.value)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError) as error:
        EMA(nn.Linear(1, 1), decay=decay)
    assert (error.value.code, error.value.key) == ("out_of_range", "decay")


def test_the_exported_folder_gives_the_averaged_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, optimizer, ema = make(decay=0.5)
    train(model, optimizer, ema, 3)
    path = resumable(tmp_path, model, optimizer, ema).save(3)
    with ema.averaged():
        expected = logits(model)
    assert not torch.allclose(expected, logits(model), atol=1e-3)
    torch.testing.assert_close(logits(load_hf(path / "ema")), expected, rtol=0, atol=0)
    exported = transformers.AutoModelForMaskedLM.from_pretrained(path / "ema").eval()
    torch.testing.assert_close(exported(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with ema.averaged():
        folder = resumable(tmp_path / "without", model, optimizer, EMA(model, export=False)).save(3)
    assert not (folder / "ema").exists()


SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
sys.path.insert(0, ROOT)
from tests.training.test_ema import IDS, logits, small, train
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.training.ema import EMA

dist.init_process_group("gloo")
with torch.device("meta"):
    model = small()
parallelize(model, sys.argv[1], torch.device("cpu"), torch.float32)
init_on_device(model, torch.device("cpu"), 0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ema = EMA(model, decay=0.5)
found = []
for _ in range(2):
    train(model, optimizer, ema, 2)
    found.append(logits(model))  # this leaves the root's parameters unsharded
    with ema.averaged():
        found.append(logits(model))
    found.append(logits(model))
full = {name: weight.full_tensor() for name, weight in ema.exported_weights().items()}
copy = small()
copy.load_state_dict(full)
found.append(logits(copy))
print(json.dumps(torch.stack(found).tolist()))
hard_exit(0)
""".replace("ROOT", repr(str(Path(__file__).parents[2])))


@pytest.fixture(scope="module")
def alone():
    model, optimizer, ema = make(decay=0.5)
    found = []
    for _ in range(2):
        train(model, optimizer, ema, 2)
        with ema.averaged():
            averaged = logits(model)
        found += [logits(model), averaged, logits(model)]
    return torch.stack([*found, averaged])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_have_the_averages_of_one_process(tmp_path, alone, strategy):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for out in ranks.run(script, 2, strategy):
        found = torch.tensor(json.loads(out.splitlines()[-1]))
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
        assert torch.equal(found[0], found[2]) and torch.equal(found[3], found[5])
        assert (found[0] - found[1]).abs().max() > 1e-3
