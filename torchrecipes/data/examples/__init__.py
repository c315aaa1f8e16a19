"""Examples of texts: pairs with or without negatives, scored pairs, labeled texts; on disk, read by memory map.

block    `ExampleBlock`: examples that were read
"""

from torchrecipes.data.examples.block import ExampleBlock

__all__ = ["ExampleBlock"]
