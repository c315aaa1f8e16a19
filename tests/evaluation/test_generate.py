import json
from collections import Counter
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tests import ranks
from torchrecipes import models
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_unigram
from torchrecipes.errors import UserError
from torchrecipes.evaluation.generation import EOS_CHECK_INTERVAL, generate, generate_text
from torchrecipes.models import save_hf
from torchrecipes.modules.head import LMHead
from torchrecipes.training.precision import autocast

VOCAB, POSITIONS = 97, 48
# Weights large enough that the likeliest token is another one at every position.
SIZES = {
    "gpt2": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    },
    "llama": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    },
}
SIZES["qwen3"] = SIZES["llama"] | {"head_dim": 32}
SIZES["qwen3_moe"] = SIZES["llama"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SIZES["olmoe"] = SIZES["llama"] | {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = [
    pytest.param(family, marks=pytest.mark.skipif(not hasattr(models, family), reason="there is no such family"))
    for family in SIZES
]


def make(family="llama", vocab_size=VOCAB, seed=1):
    return getattr(models, family)(vocab_size=vocab_size, **SIZES[family], seed=seed)


def prompts_of(*lengths, vocab_size=VOCAB):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_tokens_are_those_of_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make(family)
    save_hf(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = prompts_of(1, 9, 20, 3)
    found = generate(model, prompts, max_new_tokens=25, temperature=0)
    expected = [
        theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=25, eos_token_id=None, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    assert found == expected
    assert len({token for tokens in found for token in tokens}) > 10

    eos = found[1][6]
    ended = generate(model, prompts, max_new_tokens=25, temperature=0, eos_id=eos)
    padded = torch.tensor([[0] * (20 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (20 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=25, eos_token_id=eos, pad_token_id=0
    )
    for ours, reference in zip(ended, expected[:, 20:].tolist(), strict=True):
        assert ours == reference[: len(ours)]
        assert len(ours) == 25 or ours[-1] == eos
        assert eos not in ours[:-1] and not any(reference[len(ours) :])
    assert ended[1] == found[1][: found[1].index(eos) + 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(family):
    model = make(family)
    prompts = prompts_of(4, 20, 1, 9)
    sample = partial(generate, model, max_new_tokens=20, temperature=0.7, top_k=50, top_p=0.95)
    together = sample(prompts, seed=5)
    assert [sample([prompt], seed=5)[0] for prompt in prompts] == together
    assert sample(prompts[::-1], seed=5) == together[::-1]
    assert sample(prompts, seed=6) != together
    twice = sample([prompts[0], prompts[0]], seed=5)
    assert twice[0] == together[0] and twice[1] != twice[0]


def test_a_prompt_given_again_in_a_later_batch_goes_on_in_another_way():
    model, prompts = make(), prompts_of(4, 7) * 3
    sample = partial(generate, model, max_new_tokens=20, seed=5)
    together, prompt_counts = sample(prompts), Counter()
    assert (
        sample(prompts[:1], prompt_counts=prompt_counts)
        + sample(prompts[1:3], prompt_counts=prompt_counts)
        + sample(prompts[3:], prompt_counts=prompt_counts)
        == together
    )
    assert len({tuple(tokens) for tokens in together}) == 6


def test_samples_come_as_often_as_the_model_says():
    model = make(vocab_size=8)
    draws, prompt = 3000, [3, 1]
    settings = {"temperature": 1.5, "top_k": 5}
    found = torch.tensor(generate(model, [prompt] * draws, max_new_tokens=2, seed=1, **settings))
    counts = torch.zeros(8, 8).index_put_((found[:, 0], found[:, 1]), torch.ones(draws), accumulate=True)
    with torch.no_grad():
        expected = torch.zeros(8, 8, dtype=torch.float64)
        for first, p_first in enumerate(top_k_probabilities(model, prompt, **settings)):
            expected[first] = p_first * top_k_probabilities(model, [*prompt, first], **settings)
    expected *= draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    chi_square = ((observed - wanted) ** 2 / wanted).sum().item()
    degrees = len(wanted) - 1
    assert degrees > 8
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def top_k_probabilities(model, ids, temperature, top_k):
    logits = model.head(model(torch.tensor([ids])))[0, -1].double() / temperature
    logits[logits < logits.sort(descending=True).values[top_k - 1]] = float("-inf")
    return logits.softmax(-1)


def test_a_text_ends_with_the_positions():
    prompts = prompts_of(POSITIONS - 1, POSITIONS - 4, 2)
    found = generate(make(), prompts, max_new_tokens=100, temperature=0)
    assert [len(tokens) for tokens in found] == [1, 4, POSITIONS - 2]
    assert found[2] == generate(make(), prompts[2:], max_new_tokens=100, temperature=0)[0]


def test_padding_of_the_vocabulary_is_never_chosen():
    prompts = prompts_of(*[3] * 20)
    real = 11
    chosen = generate(make(), prompts, max_new_tokens=20, temperature=3.0)
    assert max(map(max, chosen)) >= real
    for temperature in (0, 3.0):
        chosen = generate(make(), prompts, max_new_tokens=20, temperature=temperature, unpadded_vocab_size=real)
        assert max(map(max, chosen)) < real


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_suppressed_tokens_are_never_chosen(temperature):
    model, prompts = make(), prompts_of(*[3] * 20)
    chosen = generate(model, prompts, max_new_tokens=20, temperature=temperature)
    often = [token for token, _ in Counter(token for tokens in chosen for token in tokens).most_common(2)]
    others = generate(model, prompts, max_new_tokens=20, temperature=temperature, suppress_tokens=often)
    assert not set(often) & {token for tokens in others for token in tokens}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_is_told(wrong, temperature):
    model, passes = make(), []
    model.head.decoder.weight.data[7] = wrong
    model.register_forward_pre_hook(lambda module, args: passes.append(args))
    with pytest.raises(UserError) as error:
        generate(model, prompts_of(5, 2), max_new_tokens=40, temperature=temperature)
    assert error.value.code == "nonfinite_logits"
    assert len(passes) == EOS_CHECK_INTERVAL


def test_work_is_one_token_at_a_time_and_stops_when_all_have_ended():
    model = make()
    widths = []
    model.register_forward_pre_hook(lambda module, args: widths.append(tuple(args[0].shape)))
    prompts = prompts_of(5, 2)
    first = generate(model, prompts, max_new_tokens=40, temperature=0)
    assert widths == [(2, 5)] + [(2, 1)] * 39
    widths.clear()
    eos = first[0][0]
    generate(model, prompts[:1], max_new_tokens=40, temperature=0, eos_id=eos)
    assert len(widths) == EOS_CHECK_INTERVAL


def test_tokens_can_be_had_as_they_come():
    model, told = make(), []
    found = generate(model, prompts_of(5, 2), max_new_tokens=12, seed=1, on_token=told.append)
    assert [list(tokens) for tokens in zip(*told, strict=True)] == found
    told.clear()
    generate(model, prompts_of(5), max_new_tokens=12, seed=1, eos_id=found[0][2], on_token=told.append)
    assert [token for (token,) in told] == found[0][:3]


def test_training_goes_on_as_before():
    model = make().train()
    before = torch.get_rng_state()
    generate(model, prompts_of(3), max_new_tokens=3)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    generate(model.eval(), prompts_of(3), max_new_tokens=3)
    assert not model.training


def test_dropout_is_off():
    model = models.gpt2(vocab_size=VOCAB, **SIZES["gpt2"], embd_pdrop=0.5, resid_pdrop=0.5, seed=1).train()
    found = generate(model, prompts_of(9), max_new_tokens=10, temperature=0)
    assert found == generate(make("gpt2"), prompts_of(9), max_new_tokens=10, temperature=0)


def test_blocks_compiled_for_training_are_not_compiled_anew():
    model = make()
    expected = generate(model, prompts_of(3, 9), max_new_tokens=10, temperature=0)
    for block in model.blocks:
        block.compile(backend="eager")
    counters.clear()
    assert generate(model, prompts_of(3, 9), max_new_tokens=10, temperature=0) == expected
    assert not counters["frames"]
    model(torch.tensor([[1, 2]]))
    assert counters["frames"]["total"]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_differs_in_rounding_only(family):
    model, prompts = make(family), prompts_of(9, 2)
    compute = partial(autocast, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad(), compute():
        whole = model.head(model(torch.tensor(prompts[:1])))[0, -1]
    found = generate(model, prompts, max_new_tokens=5, temperature=0, autocast=compute)
    assert found[0][0] in whole.topk(2).indices
    assert [len(tokens) for tokens in found] == [5, 5]


@pytest.mark.parametrize(
    ("prompts", "settings", "code"),
    [
        ([], {}, "no_prompt"),
        ([[1], []], {}, "bad_prompt"),
        ([[1], [1] * POSITIONS], {}, "bad_prompt"),
        ([[1, VOCAB]], {}, "bad_prompt"),
        ([[-1]], {}, "bad_prompt"),
        ([[1]], {"max_new_tokens": 0}, "out_of_range"),
        ([[1]], {"temperature": -1.0}, "out_of_range"),
        ([[1]], {"top_p": 0.0}, "out_of_range"),
    ],
)
def test_mistakes_are_told(prompts, settings, code):
    model = make().train()
    with pytest.raises(UserError) as error:
        generate(model, prompts, **({"max_new_tokens": 5} | settings))
    assert error.value.code == code and model.training


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(UserError) as error:
        generate(torch.nn.Linear(2, 2), [[1]], max_new_tokens=1)
    assert error.value.code == "cannot_generate"


def test_texts_go_on_as_their_tokens_do():
    # A UnigramBaseline tokenizer's first word has no space before it, so tokens cannot be decoded apart from their
    # prompt.
    words = "the quick brown fox jumps over the lazy dog and sees a bird in the tree "
    tokenizer = train_unigram([Document(words * 20, "a")], vocab_size=60, causal=True)
    model = make(vocab_size=tokenizer.vocab_size)
    prompts = ["the quick", "", "a bird"]
    found = generate_text(model, tokenizer, prompts, max_new_tokens=20, temperature=1.0, seed=16)
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    settings = {"eos_id": tokenizer.eos_id, "unpadded_vocab_size": tokenizer.unpadded_vocab_size}
    settings["suppress_tokens"] = [tokenizer.unk_id]
    tokens = generate(model, ids, max_new_tokens=20, temperature=1.0, seed=16, **settings)
    for prompt, before, new, said in zip(prompts, ids, tokens, found, strict=True):
        ended = new[-1] == tokenizer.eos_id
        assert (said.prompt, said.num_tokens, said.ended) == (prompt, len(new), ended)
        whole = tokenizer.decode(before + new[: len(new) - ended])
        assert tokenizer.decode(before) + said.text == whole
    assert any(said.text.startswith(" ") for said in found)
    eos = LMHead(64, tokenizer.vocab_size, bias=True)
    eos.bias.data[tokenizer.eos_id] = 1e4
    model.head = eos
    (said,) = generate_text(model, tokenizer, ["the"], max_new_tokens=5)
    assert (said.text, said.num_tokens, said.ended) == ("", 1, True)
    eos.bias.data[20] = 2e4  # what a folder's eos_token_id lists beside the tokenizer's
    (said,) = generate_text(model, tokenizer, ["the"], max_new_tokens=5)
    assert (said.num_tokens, said.ended) == (5, False)
    model.hf_adapter.stop_ids = [20, 21]
    (said,) = generate_text(model, tokenizer, ["the"], max_new_tokens=5)
    assert (said.text, said.num_tokens, said.ended) == ("", 1, True)


def test_the_unknown_token_is_no_text():
    tokenizer = train_unigram([Document("the fox " * 20, "a")], vocab_size=30, causal=True)
    model = make(vocab_size=tokenizer.vocab_size)
    model.head = LMHead(64, tokenizer.vocab_size, bias=True)
    model.head.bias.data[tokenizer.unk_id] = 1e4
    for temperature in (0, 1.0):
        (said,) = generate_text(model, tokenizer, ["the"], max_new_tokens=20, temperature=temperature)
        assert said.num_tokens and tokenizer.decode_token(tokenizer.unk_id) not in said.text


SCRIPT = """
import json, sys
import torch
from torchrecipes.evaluation.generation import generate
from torchrecipes.models import llama
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import init_on_device, parallelize

folder, sizes, prompts, eos = sys.argv[1], *map(json.loads, sys.argv[2:])
torch.distributed.init_process_group("gloo")
rank, device = torch.distributed.get_rank(), torch.device("cpu")
with torch.device("meta"):
    model = llama(**sizes)
parallelize(model, "fsdp", device, torch.float32)
init_on_device(model, device, 1)
model.train()
found = [generate(model, prompts, max_new_tokens=20, temperature=t, seed=3, eos_id=eos) for t in (0, 0.7)]
assert model.training
model.head(model(torch.tensor([[1, 2]]))).sum().backward()  # training goes on
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
hard_exit(0)
"""


def test_ranks_of_a_sharded_model_write_the_same_text(tmp_path):
    model, prompts = make(), prompts_of(9, 2)
    eos = generate(model, prompts, max_new_tokens=20, temperature=0)[0][9]
    expected = [generate(model, prompts, max_new_tokens=20, temperature=t, seed=3, eos_id=eos) for t in (0, 0.7)]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [json.dumps(value) for value in (SIZES["llama"] | {"vocab_size": VOCAB}, prompts, eos)]
    (tmp_path / "run").mkdir()
    ranks.run(script, 2, tmp_path / "run", *words)
    assert [json.loads((tmp_path / "run" / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
