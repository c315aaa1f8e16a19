"""Tokens per second of GPT-2 training: this library's step, `transformers` and nanoGPT, in turns, in one process.

    python benchmarks/causal_throughput.py --size tiny --rounds 7 --json tiny.json
    python benchmarks/causal_throughput.py --size small --nanogpt ~/nanoGPT

All train the same GPT-2 (learned positions, LayerNorm, GELU, tied head, no dropout) on the same random tokens with
fused AdamW and clipping, eager and compiled. This library takes its precision from the machine, as its recipe does
(bf16 where the processor has it); `transformers` runs `GPT2LMHeadModel` in a plain loop under bf16 autocast; nanoGPT's
model and loop step compute in fp32 on a CPU, its own choice, and with --nanogpt-bf16 under autocast, too. nanoGPT is
read from a checkout that --nanogpt names. Each loop fetches its own batches: by this library's loader, or as nanoGPT
does, by random crops.

A ratio is the median over the rounds of (tokens/s of one) / (tokens/s of the best peer in the same round).
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

SIZES = {  # layers, width, heads, tokens per row, rows per step
    "tiny": (4, 128, 4, 64, 12),
    "small": (6, 384, 6, 256, 16),
}


def make_corpus(folder: Path, vocab_size: int, num_tokens: int):
    """A corpus of random words, one document."""
    import tokenizers

    from torchrecipes.data.corpus.corpus import prepare_corpus
    from torchrecipes.data.sources.text_files import files
    from torchrecipes.data.tokenizers.tokenizer import make_tokenizer

    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {role: tokenizers.AddedToken("<|endoftext|>", special=True) for role in ("bos", "eos", "pad")}
    ids = np.random.default_rng(0).integers(1, vocab_size, num_tokens)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    corpus, _ = prepare_corpus(
        folder / "corpus",
        files(str(folder / "text.txt"), sample_by="line"),
        make_tokenizer(backend, special, pad_vocab_to_multiple_of=1),
        validation_fraction=0,
        tokenizer_threads=0,
    )
    return corpus


class Ours:
    """The training step of recipes/causal_pretrain.py."""

    def __init__(self, corpus, args, compiled):
        from torchrecipes.data.batching.causal import CausalLMCollator
        from torchrecipes.data.batching.loader import Loader
        from torchrecipes.data.batching.packing import PackedDataset
        from torchrecipes.models import gpt2
        from torchrecipes.optim import adamw, cosine
        from torchrecipes.training.guard import Guard
        from torchrecipes.training.precision import autocast, resolve_dtype

        layers, width, heads, self.row_len, self.rows = args.shape
        device = torch.device("cpu")
        self.precision = resolve_dtype(args.precision, device)
        self.autocast = partial(autocast, device, self.precision)
        self.model = gpt2(
            vocab_size=args.vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=self.row_len,
        ).train()
        if compiled:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = adamw(self.model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        self.scheduler, self.guard, self.step = cosine(self.optimizer, max_steps=10**6), Guard(), 0
        rows = PackedDataset(corpus, self.row_len, pad_id=0, lookahead=1)
        targets = CausalLMCollator(eos_id=0, cross_document_attention=True)
        self.loader = Loader(rows, targets, seed=0, global_batch_size=self.rows, micro_batch_size=self.rows)

    def run(self, steps: int) -> float:
        from torchrecipes.distributed.fsdp import clip_grad_norm
        from torchrecipes.losses import causal_lm_loss

        start = time.perf_counter()
        for _ in range(steps):
            self.step += 1
            batches = self.loader.next_step()
            targets = sum(batch.num_targets for batch in batches)
            loss_sum = torch.zeros(())
            for batch in batches:
                with self.autocast():
                    hidden = self.model(batch.input_ids, **batch.documents)
                    loss, token_loss = causal_lm_loss(hidden, self.model.head, batch.labels, return_token_loss=True)
                (loss / targets).backward()
                loss_sum += token_loss.sum()
            grad_norm = clip_grad_norm(self.model, 1.0)
            self.guard.step(self.optimizer, loss_sum / targets, grad_norm)
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.guard.check(self.step)
        return steps * self.rows * self.row_len / (time.perf_counter() - start)


class Peer:
    """A plain loop over another library's model, with the batches of nanoGPT: random crops of a memory-mapped file."""

    def __init__(self, model, loss_of, tokens: Path, args, compiled, bf16):
        _, _, _, self.row_len, self.rows = args.shape
        self.model, self.loss_of, self.tokens, self.bf16 = model.train(), loss_of, tokens, bf16
        self.forward = torch.compile(model) if compiled else model
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def batch(self):
        data = np.memmap(self.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - self.row_len, (self.rows,)).tolist()
        crops = np.stack([data[start : start + self.row_len + 1] for start in starts]).astype(np.int64)
        return torch.from_numpy(crops[:, :-1]).contiguous(), torch.from_numpy(crops[:, 1:]).contiguous()

    def run(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            inputs, targets = self.batch()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                loss = self.loss_of(self.forward, inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return steps * self.rows * self.row_len / (time.perf_counter() - start)


def transformers_peer(tokens, args, compiled, bf16=True):
    import transformers

    layers, width, heads, row_len, _ = args.shape
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": row_len, "vocab_size": args.vocab}
    config = transformers.GPT2Config(**sizes, **none, use_cache=False, bos_token_id=0, eos_token_id=0)

    def loss_of(forward, inputs, _targets):
        return forward(input_ids=inputs, labels=inputs).loss

    return Peer(transformers.GPT2LMHeadModel(config), loss_of, tokens, args, compiled, bf16)


def nanogpt_peer(tokens, args, compiled, bf16=False):
    spec = importlib.util.spec_from_file_location("nanogpt_model", args.nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, width, heads, row_len, _ = args.shape
    config = module.GPTConfig(
        block_size=row_len, vocab_size=args.vocab, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=True
    )

    def loss_of(forward, inputs, targets):
        return forward(inputs, targets)[1]

    return Peer(module.GPT(config), loss_of, tokens, args, compiled, bf16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of each in a round; default: 40 of tiny, 4 of small")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of this library")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; left out without it")
    parser.add_argument("--nanogpt-bf16", action="store_true", help="measure nanoGPT under bf16 autocast, too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.shape = SIZES[args.size]
    steps = args.steps or {"tiny": 40, "small": 4}[args.size]

    from torchrecipes.training.activation_checkpointing import tune_malloc

    tune_malloc()  # as the recipe does; it helps all of them
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name), args.vocab, 1_000_000)
        tokens = Path(name) / "tokens.bin"
        corpus.read(0, corpus.num_tokens).astype(np.uint16).tofile(tokens)
        makers = {}
        for suffix, compiled in (("", False), (", compiled", True)):
            makers[f"this library{suffix}"] = partial(Ours, corpus, args, compiled)
            makers[f"transformers bf16{suffix}"] = partial(transformers_peer, tokens, args, compiled)
            if args.nanogpt:
                makers[f"nanoGPT fp32{suffix}"] = partial(nanogpt_peer, tokens, args, compiled)
            if args.nanogpt and args.nanogpt_bf16:
                makers[f"nanoGPT bf16{suffix}"] = partial(nanogpt_peer, tokens, args, compiled, bf16=True)
        runners = {label: make() for label, make in makers.items()}
        for runner in runners.values():
            runner.run(3)  # compiles
        rates = {label: [] for label in runners}
        for _ in range(args.rounds):
            for label, runner in runners.items():
                rates[label].append(runner.run(steps))

    best = [max(v[i] for k, v in rates.items() if not k.startswith("this")) for i in range(args.rounds)]
    median = {label: statistics.median(values) for label, values in rates.items()}
    ratios = {k: statistics.median(a / b for a, b in zip(v, best, strict=True)) for k, v in rates.items()}
    layers, width, heads, row_len, rows = args.shape
    threads = torch.get_num_threads()
    print(f"{layers} layers x {width} x {heads} heads, {rows} rows of {row_len}, vocabulary {args.vocab}")
    print(f"torch {torch.__version__}, {threads} threads")
    for label, value in median.items():
        print(f"{label:28s} {value:10,.0f} tokens/s {ratios[label]:6.2f} x the best peer")
    if args.json:
        figures = {"torch": torch.__version__, "threads": threads, "cores": os.cpu_count(), "shape": args.shape}
        args.json.write_text(
            json.dumps(figures | {"median": median, "ratios": ratios, "rounds": rates}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
