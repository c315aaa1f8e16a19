"""Recipes share text: what is the same in two of them is the same to the letter."""

import difflib
import re

from torchrecipes.config.catalog import find_recipe

# What pretraining of encoders and of decoders may differ in.
OBJECTIVE = re.compile(
    r"mask|mlm|causal|targets|lookahead|eos_id|unigram_baseline|router|balance|sample|prompts|generate|loss_of|z_loss|smoothing"
    r"|cross_document|packing|position|data\.next|experts|NeoBERT|neobert|gpt2|moe|decoder|labels|seed: int"
    r"|train_bpe|wordpiece|AutoModel|texts|NonNegative|evaluate|Collator|compute_loss|eval_collator"
)


def lines(recipe):
    """The code without docstring, where it is told what the recipe is for."""
    text = find_recipe(recipe).read_text(encoding="utf-8")
    return text.split('"""', 2)[2].splitlines()


def test_the_pretraining_recipes_differ_only_where_their_objectives_do():
    masked, causal = lines("mlm_pretrain"), lines("causal_pretrain")
    for kind, i, j, k, m in difflib.SequenceMatcher(None, masked, causal, autojunk=False).get_opcodes():
        changed = masked[i:j] + causal[k:m]
        if kind != "equal" and any(line.strip() for line in changed):
            assert OBJECTIVE.search("\n".join(changed)), "\n".join(["the recipes have drifted apart here:", *changed])
