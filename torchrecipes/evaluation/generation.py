"""Text generation with a causal language model, with a cache of keys and values.

Prompts of different lengths share a batch, padded on the right. A token attends to the positions up to its own, and by
then those hold its own prompt and completion, so what padding leaves in the cache is never used.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchrecipes.devices import float64_device
from torchrecipes.errors import UserError
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.evaluation.sampling import check_sampling, filter_logits, sample, uniform_numbers
from torchrecipes.models.hf_adapter import adapter_of
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules.cache import KVCache

if TYPE_CHECKING:
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer

EOS_CHECK_INTERVAL = 8  # tokens between two checks whether all texts have ended: a check waits for the device


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that the model added.

    Attributes:
        prompt: as it was given.
        text: the new text; `prompt + text` is all of it.
        num_tokens: new tokens, with the one that ends the text.
        ended: whether the model ended the text, rather than a limit of tokens or positions.
    """

    prompt: str
    text: str
    num_tokens: int
    ended: bool


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    unpadded_vocab_size: int | None = None,
    suppress_tokens: Sequence[int] = (),
    prompt_counts: Counter[tuple[int, ...]] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    on_token: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt by at most `max_new_tokens` tokens, all of them in one batch.

    A text also ends where the model has no more positions: prompt and completion together are never longer than
    `max_position_embeddings`. No global random generator is touched, and training modes are restored. Under
    `fully_shard` every rank calls it with the same arguments.

    Args:
        model: a decoder of `torchrecipes.models`: `model(input_ids, position_ids=..., cache=...)` and `model.head`.
        prompts: ids of each, one at least.
        max_new_tokens: 1 or more.
        temperature: 0 always takes the most probable token; below 1 sharpens the model's distribution.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the most probable tokens whose probabilities sum to this.
        seed: chooses the samples. A completion does not depend on the other prompts in the batch; a prompt that is
            given twice has two completions.
        eos_id: the token that ends a text, or several. None: none does.
        unpadded_vocab_size: ids from here on are padding of the vocabulary and are never chosen. None: there are none.
        suppress_tokens: other ids that are never chosen.
        prompt_counts: how often each prompt occurred in earlier batches; updated. With it, texts do not depend on how
            prompts are batched. None: this is the only batch.
        autocast: makes the context to compute in.
        on_token: called after every step with a token per prompt; tokens after a text's end mean nothing. The host
            waits for the device at each.

    Returns:
        The new tokens of every prompt, with one of `eos_id` as the last where the model has ended the text.

    Raises:
        UserError: no prompt, or one that `check_prompts` refuses; a setting out of range; a model without a cache; or
            logits that are not finite (code `nonfinite_logits`).
    """
    prompts = [list(prompt) for prompt in prompts]
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} must be 1 or more", key="max_new_tokens", code="out_of_range")
    check_prompts(model, prompts)
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest, positions = int(lengths.max()), model.config.max_position_embeddings
    steps = min(max_new_tokens, positions - int(lengths.min()))
    uniform = uniform_numbers(prompts, steps, seed, prompt_counts).to(float64_device(device)) if temperature else None

    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    input_ids, next_position = input_ids.to(device), lengths.to(device)[:, None]
    position_ids = torch.arange(longest, device=device).expand(len(prompts), -1)
    last_index = next_position - 1  # of the input token whose hidden state predicts the next one

    new_tokens = torch.empty(len(prompts), steps, dtype=torch.int64, device=device)
    suppressed = torch.tensor(suppress_tokens, dtype=torch.int64).to(device)
    eos_ids = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else sorted(eos_id)
    ends = torch.tensor(eos_ids, dtype=torch.int64).to(device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    broken = torch.zeros_like(ended)  # read at the end only, since that waits for the device
    with evaluation_mode(model), autocast(), _without_compile(model):
        cache = _cache(model, len(prompts), min(longest + steps, positions), device)
        for step in range(steps):
            hidden = model(input_ids, position_ids=position_ids, cache=cache)
            last_BD = hidden.gather(1, last_index[:, :, None].expand(-1, -1, hidden.shape[2])).squeeze(1)
            logits = model.head(last_BD)[:, :unpadded_vocab_size].float()
            broken |= ~logits.isfinite().all(-1)
            logits = logits.index_fill(1, suppressed, float("-inf"))
            token_B = (
                sample(filter_logits(logits, temperature, top_k, top_p), uniform[:, step])
                if temperature
                else logits.argmax(-1)
            )
            new_tokens[:, step] = token_B
            ended |= broken | (next_position.squeeze(1) + 1 >= positions) | torch.isin(token_B, ends)
            if on_token:
                on_token(token_B.tolist())
            if (on_token or (step + 1) % EOS_CHECK_INTERVAL == 0) and _all_everywhere(ended, model):
                break
            # A text that has ended is computed on, at a valid position.
            input_ids, position_ids = token_B[:, None], next_position.clamp(max=cache.max_len - 1)
            next_position, last_index = next_position + 1, torch.zeros_like(next_position)
    if broken.any():
        raise UserError(
            "the model gives NaN or infinite logits: its weights are damaged, or its training diverged",
            hint="Take an earlier checkpoint.",
            code="nonfinite_logits",
        )
    return [
        _up_to_the_end(tokens[: positions - len(prompt)], eos_ids)
        for prompt, tokens in zip(prompts, new_tokens[:, : step + 1].tolist(), strict=True)
    ]


def check_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], names: Sequence[str] | None = None, key: str | None = None
) -> None:
    """Checks that the model can continue every prompt.

    Args:
        model: a causal one.
        prompts: token ids of each.
        names: what a message calls each prompt. None: prompt 1, prompt 2, ...
        key: the config key or option that they are from.

    Raises:
        UserError: a prompt has no token, leaves no room for a new one, or has an id that the model does not have (code
            `bad_prompt`); there is no prompt (`no_prompt`); the model has no cache (`cannot_generate`).
    """
    if not isinstance(model, Transformer) or not model.causal:
        problem = f"{type(model).__name__} cannot generate text"
        raise UserError(problem, key=key, hint="Use a decoder of torchrecipes.models.", code="cannot_generate")
    if not prompts:
        raise UserError("there is no prompt to continue", key=key, hint="Give one at least.", code="no_prompt")
    positions, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    names = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            problem, hint = "has no token", "Begin it with the token that begins a document."
        elif len(prompt) >= positions:
            problem = (
                f"has {len(prompt):,} tokens, and the model has {positions:,} positions (max_position_embeddings), "
                "which leaves no room for a new one"
            )
            hint = "Shorten the prompt."
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            problem = f"has ids from {min(prompt)} to {max(prompt)}, and the model has {vocab_size:,} tokens"
            hint = "Use the model's own tokenizer."
        else:
            continue
        raise UserError(f"{name} {problem}", key=key, hint=hint, code="bad_prompt")


def generate_text(
    model: nn.Module,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prompt_counts: Counter[tuple[int, ...]] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    on_token: Callable[[str], None] | None = None,
) -> list[Completion]:
    """`generate` from texts to texts, with the same arguments. The tokenizer's unknown token is never chosen.

    Args:
        model: as in `generate`.
        tokenizer: a `torchrecipes.data` Tokenizer, loaded for causal models: a prompt begins like a document, and the
            end-of-sequence token ends a text.
        prompts: texts. The empty one begins a document.
        on_token: called with each piece of the first prompt's text as soon as its characters are complete.
    """
    prompt_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    eos_ids = {*adapter_of(model).stop_ids, tokenizer.eos_id} - {None}
    continued = generate(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=eos_ids,
        unpadded_vocab_size=tokenizer.unpadded_vocab_size,
        suppress_tokens=[] if tokenizer.unknown_id is None else [tokenizer.unknown_id],
        prompt_counts=prompt_counts,
        autocast=autocast,
        on_token=_in_pieces(tokenizer, eos_ids, prompt_ids[0], on_token) if on_token and prompt_ids else None,
    )
    return [
        _continuation(tokenizer, eos_ids, prompt, ids, new)
        for prompt, ids, new in zip(prompts, prompt_ids, continued, strict=True)
    ]


def _continuation(tokenizer, eos_ids: set[int], prompt: str, ids: list[int], new: list[int]) -> Completion:
    return Completion(prompt, _added_text(tokenizer, eos_ids, ids, new), len(new), ended=new[-1] in eos_ids)


def _added_text(tokenizer, eos_ids: set[int], ids: list[int], new: list[int]) -> str:
    """The text that `new` tokens, up to the one that ends a text, add to that of `ids`."""
    new = list(itertools.takewhile(lambda token: token not in eos_ids, new))
    # Decoded together, since a character may begin in the prompt's last token, and a first word has no space.
    before, whole = tokenizer.decode(ids), tokenizer.decode(ids + new)
    same = 0
    while same < len(before) and before[same] == whole[same : same + 1]:
        same += 1
    return whole[same:]


def _in_pieces(
    tokenizer, eos_ids: set[int], ids: list[int], on_token: Callable[[str], None]
) -> Callable[[list[int]], None]:
    new, printed = [], 0

    def add(tokens: list[int]) -> None:
        nonlocal printed
        new.append(tokens[0])
        text = _added_text(tokenizer, eos_ids, ids, new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose last bytes are yet to come
            on_token(text[printed:])
            printed = len(text)

    return add


def _cache(model: nn.Module, batch: int, max_len: int, device: torch.device) -> KVCache:
    attention = model.blocks[0].self_attn
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = attention.qkv_proj.weight.dtype
    return KVCache(len(model.blocks), batch, max_len, attention.num_kv_heads, attention.head_dim, dtype, device)


def _all_everywhere(ended: Tensor, model: nn.Module) -> bool:
    """Whether all texts have ended, on all ranks of a sharded model, since every rank takes part in its all-gathers."""
    done = ended.all()
    if isinstance(model, FSDPModule):
        done = done.int()
        torch.distributed.all_reduce(done, torch.distributed.ReduceOp.MIN)
    return bool(done)


def _without_compile(model: nn.Module) -> AbstractContextManager:
    """Runs compiled blocks eagerly: every new length of a prompt would recompile them."""
    if all(getattr(block, "_compiled_call_impl", None) is None for block in model.blocks):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _up_to_the_end(tokens: list[int], eos_ids: Collection[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[: end + 1]
