"""Hard negatives: passages that a model takes for relevant, and that are not.

hard_negatives   `mine_hard_negatives`: from pairs to pairs with negatives
selection        `NegativeRules`: which candidates become negatives
vector_index     `build_index`: exact search, faiss, usearch
text_store       distinct texts on disk, and which are one document
"""

from torchrecipes.mining.hard_negatives import MiningStats, mine_hard_negatives
from torchrecipes.mining.selection import NegativeRules
from torchrecipes.mining.vector_index import ApproximateIndex, ExactIndex, build_index

__all__ = ["ApproximateIndex", "ExactIndex", "MiningStats", "NegativeRules", "build_index", "mine_hard_negatives"]
