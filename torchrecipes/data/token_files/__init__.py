"""Corpora that other tools have tokenized, read where they lie.

source      `TokenSource`: what the functions below return
nanogpt     `nanogpt_tokens`: a flat file of ids
megatron    `megatron_tokens`: a `.bin` file and its `.idx`
datatrove   `datatrove_tokens`: `.ds` files and their `.ds.index`
mds         `mds_tokens`: a folder of MosaicML Streaming
"""

from torchrecipes.data.token_files.datatrove import datatrove_tokens
from torchrecipes.data.token_files.mds import mds_tokens
from torchrecipes.data.token_files.megatron import megatron_tokens
from torchrecipes.data.token_files.nanogpt import nanogpt_tokens
from torchrecipes.data.token_files.source import TokenSource

__all__ = ["TokenSource", "datatrove_tokens", "mds_tokens", "megatron_tokens", "nanogpt_tokens"]
