"""From text to batches: sources, tokenizers, corpora, the order of rows, packing, masking, the loader."""
