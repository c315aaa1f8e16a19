"""Model families: one file each, with its config, its network and its map to the Hugging Face layout."""
