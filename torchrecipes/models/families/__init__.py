"""One file per model family: its config, sizes, blocks and Hugging Face layout."""
