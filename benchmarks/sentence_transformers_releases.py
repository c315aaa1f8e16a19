"""Checks that other releases of sentence-transformers load our folders and give the same embeddings.

    python benchmarks/sentence_transformers_releases.py /envs/st3/bin/python /envs/st4/bin/python ...

Each argument is a Python with a release of its own; torchrecipes need not be installed there. Folders of all families,
poolings and modules are written, loaded there, and compared; the largest difference is printed for each. A NeoBERT is
an `eurobert` there, which transformers has since release 5.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from torchrecipes.data.sources import Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.evaluation import TextEncoder
from torchrecipes.models import EmbeddingModel, bert, distilbert, modernbert, neobert, roberta, save_hf

TEXTS = ["The cat sat on the mat.", "", "A dog", "It was raining all day long, and nobody went out to the sea."]
TEXTS += ["Two birds in a tree sang of the spring; a boat came back from the sea with fish for the town."]
PROMPTS = {"query": "query: ", "passage": "the passage says: "}
PROMPTED = {"prompts": PROMPTS, "include_prompt": False}
CASES = {
    "bert mean": (bert, {}),
    "bert cls, projection": (bert, {"pooling": "cls", "projection": 8, "prompts": PROMPTS}),
    "bert mean, prompts pooled": (bert, {"prompts": PROMPTS, "default_prompt": "query"}),
    "roberta weighted mean, cut": (roberta, {"pooling": "weighted_mean", "max_length": 20, **PROMPTED}),
    "distilbert last, not normalized": (distilbert, {"pooling": "last", "normalize": False, "similarity": "dot"}),
    "modernbert max": (modernbert, {"pooling": "max", **PROMPTED}),
    "neobert mean, temperature": (neobert, {"projection": 40, "learnable_temperature": 0.05, **PROMPTED}),
}
THERE = """
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import sentence_transformers
print(sentence_transformers.__version__)
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    try:
        model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        # Release 3 and 4 count the first token of an empty prompt as one.
        found = [model.encode(texts, **({"prompt": ""} if model.default_prompt_name else {})).tolist()]
        found += [model.encode(texts, prompt_name=name).tolist() for name in ("query", "document")]
        print(json.dumps([model.max_seq_length, found]))
    except Exception as error:
        print(json.dumps(repr(error)[:200]))
"""


def make(folder: Path, family, settings: dict) -> np.ndarray:
    tokenizer = train_wordpiece([Document(" ".join(TEXTS) * 3, "here")], vocab_size=120)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 60, "initializer_range": 0.2}
    sizes |= {"pad_token_id": 0} if family is roberta else {}
    model = EmbeddingModel(family(**sizes), **settings)
    save_hf(model, folder, tokenizer)
    encoder = TextEncoder(model, tokenizer)
    return np.stack([encoder.encode(TEXTS, prompt) for prompt in ("", "query", "passage")])


def main(interpreters: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        ours = {name: make(Path(place) / str(i), *case) for i, (name, case) in enumerate(CASES.items())}
        folders = [str(Path(place) / str(i)) for i in range(len(CASES))]
        for interpreter in interpreters:
            command = [interpreter, "-c", THERE, json.dumps(TEXTS), *folders]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{interpreter}: {done.stderr.strip().splitlines()[-1]}")
                continue
            version, *lines = done.stdout.splitlines()
            for (name, (_, settings)), line in zip(CASES.items(), lines, strict=True):
                found = json.loads(line)
                if isinstance(found, str):
                    print(f"{version}  {name}: {found}")
                    continue
                length, embeddings = found
                difference = np.abs(np.array(embeddings, np.float32) - ours[name]).max()
                limit = settings.get("max_length", 60 if "roberta" not in name else 59)
                print(f"{version}  {name}: {difference:.1e}{'' if length == limit else f', max_seq_length {length}'}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:] or [sys.executable])
