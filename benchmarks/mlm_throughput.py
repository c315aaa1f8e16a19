"""Tokens per second of masked-LM pretraining: this library's loop and `transformers.Trainer`, in turns, in one process.

    python benchmarks/mlm_throughput.py --rounds 3 --json mlm_throughput.json
    ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python benchmarks/mlm_throughput.py --precision fp32    # as on a processor without AVX-512

Both train the same NeoBERT-style encoder (`EuroBertForMaskedLM` there) on the same random tokens: 16 rows of 256, a
vocabulary of 16,384, 20 % masked, AdamW, gradient clipping. Needs the extra `dev` and `accelerate`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SEQ_LEN, ROWS, VOCAB = 256, 16, 16_384


def make_text():
    """A tokenizer of 16,384 made-up words, and random texts of 20 to 200 of them."""
    from torchrecipes.data.sources import Document
    from torchrecipes.data.tokenizers.load import train_wordpiece

    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + int(c)) for c in rng.integers(0, 26, 6)) for _ in range(40_000)]
    texts = [" ".join(words[int(i)] for i in rng.integers(0, len(words), int(n))) for n in rng.integers(20, 200, 2_000)]
    return train_wordpiece([Document(t, str(i)) for i, t in enumerate(texts)], vocab_size=VOCAB), texts


class Ours:
    """The loop of recipes/mlm_pretrain.py, a number of steps at a time."""

    def __init__(self, tokenizer, folder, args, compiled):
        from torchrecipes.data.batching.loader import Loader
        from torchrecipes.data.batching.mlm import MLMCollator
        from torchrecipes.data.batching.packing import PackedDataset
        from torchrecipes.data.corpus.corpus import prepare_corpus
        from torchrecipes.data.sources.text_files import files
        from torchrecipes.models import neobert
        from torchrecipes.optim import adamw

        corpus, _ = prepare_corpus(folder / "corpus", files(str(folder / "text.txt"), sample_by="line"), tokenizer)
        self.model = neobert(
            vocab_size=tokenizer.vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            intermediate_size=args.intermediate_size,
        )
        if compiled:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = adamw(self.model, lr=1e-3)
        rows = PackedDataset(corpus, SEQ_LEN, tokenizer.pad_id)
        self.loader = Loader(rows, MLMCollator(tokenizer, 0.2), seed=0, global_batch_size=ROWS, micro_batch_size=ROWS)
        self.bf16, self.step = args.precision == "bf16", 0

    def run(self, steps: int) -> float:
        from torchrecipes.losses import masked_lm_loss

        start = time.perf_counter()
        for _ in range(steps):
            self.step += 1
            for batch in self.loader.next_step():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                    hidden = self.model(batch.input_ids, **batch.documents)
                    loss = masked_lm_loss(hidden, self.model.head, batch.masked_positions, batch.masked_labels)
                (loss / batch.num_targets).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return steps * ROWS * SEQ_LEN / (time.perf_counter() - start)


class Peer:
    """`transformers.Trainer` on `EuroBertForMaskedLM`; its own time per step, start-up left out."""

    def __init__(self, tokenizer, texts, folder, args, bf16):
        import transformers

        transformers.logging.set_verbosity_error()
        tokenizer.save(folder / "tokenizer")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        config = transformers.EuroBertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=args.intermediate_size,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
            **{f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "mask")},
        )
        self.model = transformers.EuroBertForMaskedLM(config)
        stream = [token for text in texts for token in tokenizer.encode(text)]
        self.rows = [{"input_ids": stream[i : i + SEQ_LEN]} for i in range(0, len(stream) - SEQ_LEN, SEQ_LEN)]
        self.folder, self.bf16 = folder, bf16

    def run(self, steps: int) -> float:
        import transformers

        times = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args, **kwargs):  # noqa: ARG002
                times.append(time.perf_counter())

        trainer = transformers.Trainer(
            self.model,
            transformers.TrainingArguments(
                str(self.folder / "trainer"),
                per_device_train_batch_size=ROWS,
                max_steps=steps + 1,
                bf16=self.bf16,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=self.rows,
            data_collator=transformers.DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=0.2),
            callbacks=[Clock()],
        )
        trainer.train()
        return (len(times) - 1) * ROWS * SEQ_LEN / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of each in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=688)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of both")
    parser.add_argument("--fp32-peer", action="store_true", help="measure the peer in fp32 too")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, texts = make_text()
        (folder / "text.txt").write_text("\n".join(texts))
        peer = f"Trainer {args.precision}"
        runners = {
            "ours": Ours(tokenizer, folder, args, compiled=False),
            "ours, compiled": Ours(tokenizer, folder, args, compiled=True),
            peer: Peer(tokenizer, texts, folder, args, bf16=args.precision == "bf16"),
        }
        if args.fp32_peer:
            runners["Trainer fp32"] = Peer(tokenizer, texts, folder, args, bf16=False)
        for runner in runners.values():
            runner.run(2)
        rates = {label: [] for label in runners}
        for _ in range(args.rounds):
            for label, runner in runners.items():
                rates[label].append(runner.run(args.steps))

    median = {label: statistics.median(values) for label, values in rates.items()}
    for label, value in median.items():
        ratio = value / median[peer]
        print(f"{label:16s} {value:10,.0f} tokens/s   {ratio:5.2f} x {peer}   {[round(v) for v in rates[label]]}")
    if args.json:
        figures = {"torch": torch.__version__, "cores": os.cpu_count(), "median": median, "rounds": rates}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
