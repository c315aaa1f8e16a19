"""What a stream's shuffling costs: a small GPT on text that is sorted by topic, with blocks of several sizes.

    python benchmarks/stream_shuffling.py --data novels wikipedia.jsonl owasp.jsonl german.jsonl --blocks 1 4 16 64

The paths are read in this order, cut into documents of 4,000 characters. One epoch is trained for every number of
blocks: 1 is a permutation of all rows, as in a prepared corpus; `none` has the rows in the order of the text. Prints
the loss of documents held out of all paths, and how often the next row in training is of another path than this one.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from torchrecipes.data import CausalLMCollator, Loader, PackedDataset, evaluation_batches
from torchrecipes.data.batching import StreamedRows
from torchrecipes.data.corpus import Stream, open_stream, prepare_corpus
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_bpe
from torchrecipes.losses import causal_lm_loss
from torchrecipes.models import gpt2
from torchrecipes.optim import adamw, cosine

SEQ_LEN, BATCH, VOCAB = 128, 16, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="files or folders, one topic each")
    parser.add_argument("--blocks", nargs="+", default=["1", "4", "16", "none"], help="blocks in the text, or none")
    parser.add_argument("--megabytes", type=float, default=2, help="read of each path, at most")
    parser.add_argument(
        "--runs", type=int, default=1, help="parts of each path; the first of all come first, and so on"
    )
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = []
        parts = [split(path, args.megabytes * 1e6, args.runs) for path in args.data]
        for run in range(args.runs):
            for number in range(len(parts)):
                texts.append(folder / f"{run:03d}-{number}.jsonl")
                texts[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in parts[number][run]))
        source = files([str(path) for path in texts])
        tokenizer = train_bpe(source, vocab_size=VOCAB, causal=True)
        stream = open_stream(
            source, tokenizer, cache_dir=folder / "cache", validation_fraction=0.03, shard_tokens=1 << 13
        )
        while not stream.finished:
            stream.wait()
        ends = []  # of every text, in tokens
        for number, path in enumerate(texts):
            corpus, _ = prepare_corpus(folder / f"corpus-{number}", files(str(path)), tokenizer, 0.03)
            ends.append(corpus.num_tokens)
        ends = np.cumsum(ends) / sum(ends)
        topics = len(parts)
        for blocks in args.blocks:
            for seed in range(args.seeds):
                train(stream.folder, tokenizer, blocks, seed, ends, topics)


def split(path: str, size: float, runs: int) -> list[list[str]]:
    """The beginning of a text in so many parts of equal numbers of documents."""
    documents: list[str] = []
    for document in files(path, max_document_chars=4000):
        if sum(map(len, documents)) < size:
            documents.append(document.text)
    return [list(part) for part in np.array_split(np.array(documents, dtype=object), runs)]


def train(folder: Path, tokenizer, blocks: str, seed: int, ends: np.ndarray, num_topics: int) -> None:
    """Trains one epoch and prints the loss at its end."""
    stream = Stream(folder)
    tokens = sum(shard.tokens for shard in stream.shards)
    make_rows = partial(PackedDataset, seq_len=SEQ_LEN, pad_id=tokenizer.pad_id, lookahead=1)
    size = tokens // SEQ_LEN if blocks == "none" else -(-tokens // SEQ_LEN // int(blocks))
    rows = StreamedRows(stream, make_rows, SEQ_LEN, size)
    last = len(stream.shards)
    held_out = make_rows(stream.corpus(0, stream.num_validation_shards(last), "validation"))
    collator = CausalLMCollator(tokenizer.eos_id)
    shuffle = blocks != "none"
    loader = Loader(rows, collator, seed=seed, shuffle=shuffle, global_batch_size=BATCH, micro_batch_size=BATCH)
    steps = rows.num_rows // BATCH
    numbers, _ = rows.locate(np.arange(steps * BATCH), seed, shuffle)
    topics = ends.searchsorted(numbers / rows.num_rows) % num_topics
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": SEQ_LEN}
    model = gpt2(vocab_size=tokenizer.vocab_size, **sizes).train()
    optimizer = adamw(model, lr=3e-3)
    scheduler = cosine(optimizer, max_steps=steps)
    for _ in range(steps):
        (batch,) = loader.next_step()
        loss = causal_lm_loss(model(batch.input_ids, **batch.documents), model.head, batch.labels)
        (loss / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.eval()
    total = targets = 0
    with torch.no_grad():
        for batch in evaluation_batches(held_out, collator, 32):
            total += float(causal_lm_loss(model(batch.input_ids, **batch.documents), model.head, batch.labels))
            targets += batch.num_targets
    found = {
        "blocks": len(rows._blocks) if shuffle else "none",
        "rows": rows.num_rows,
        "steps": steps,
        "seed": seed,
        "other_topic_next": round(float(np.mean(topics[1:] != topics[:-1])), 3),
        "validation_loss": round(total / targets, 4),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
