"""`EmbeddingModel`: an encoder whose hidden states are pooled to one vector per text."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.config.components import resolve
from torchrecipes.config.metadata import Positive
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models.compatibility import max_positions
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.hub import load_hf_weights, meta_model_from_hf
from torchrecipes.models.late_interaction import LateInteraction
from torchrecipes.models.sentence_transformers_folder import EmbeddingSettings, read_settings, settings_files
from torchrecipes.models.stored_tensors import StoredTensor
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import Pooling
from torchrecipes.modules.init import copy_full, init_tensor

if TYPE_CHECKING:
    from torchrecipes.data.batching.batch import Batch

LARGEST_LOGIT_SCALE = math.log(100.0)  # as CLIP's (Radford et al. 2021, arXiv:2103.00020, section 2.5)
PROMPT_NAMES = ("query", "passage")  # that may be asked for without being defined: they are empty then

_print_once = functools.cache(functools.partial(print, flush=True))


@dataclass
class EmbeddingConfig:
    """The config group `embedding`: what turns hidden states into embeddings. None: as in the folder of `init_from`."""

    pooling: Literal["mean", "cls", "last", "weighted_mean", "max"] | None = None  # else mean
    projection: int | None = None  # dimensions of the embeddings, by a linear layer; else those of the hidden states
    normalize: bool | None = None  # embeddings of length 1; else true
    similarity: Literal["cosine", "dot"] | None = None  # how they are to be compared; else cosine
    prompts: dict[str, str] | None = None  # text before a text, by kind: query, passage; else none
    include_prompt: bool | None = None  # whether pooling counts the tokens of prompts; else true
    late_interaction: LateInteraction | None = None  # a vector for every token instead of pooling: ColBERT
    learnable_temperature: Positive | None = None  # its initial value; with it loss.temperature=null

    def tokens_as_vectors(self, init_from: str | None = None) -> LateInteraction | None:
        """`late_interaction`, if it is set here or by the folder.

        Args:
            init_from: the folder, a checkpoint or a run.
        """
        found = read_settings(resolve_model_folder(init_from), lambda _line: None) if init_from else None
        return self.late_interaction or (found and found.late_interaction)

    @property
    def chosen(self) -> dict[str, Any]:
        """What is set: arguments of `EmbeddingModel` and `meta_embedding_model`."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def check_loss(self, loss: Any) -> None:
        """Checks that a loss is one of embeddings, and sees the learnable temperature, as no loss of cosines does.

        Args:
            loss: its `Component`, with `args`.

        Raises:
            UserError: a loss of a classifier (code `not_a_loss_of_embeddings`), or one that does not see the
                temperature (`inert_temperature`).
        """
        if "labels" in inspect.signature(resolve(loss.path).__call__).parameters:
            problem, hint = f"{loss.path} is a loss of a classifier", "Use one of embeddings, such as InfoNCE."
            raise UserError(problem, key="loss", hint=hint, code="not_a_loss_of_embeddings")
        args = {**loss.args, **getattr(loss.args.get("loss"), "args", {})}  # of Matryoshka: the loss in it
        takes_dot = args.get("similarity") == "dot" or ("temperature" in args and args["temperature"] is None)
        if self.learnable_temperature is not None and not takes_dot:
            raise UserError(
                "the loss takes cosines, which the learnable temperature does not change",
                key="embedding.learnable_temperature",
                hint="Set loss.temperature=null, so that the loss takes dot products as they are.",
                code="inert_temperature",
            )

    def prompting(self, init_from: str | None = None) -> tuple[dict[str, str], bool]:
        """The prompts by kind of text, and whether pooling counts their tokens: set here, or by the folder.

        Args:
            init_from: the folder, a checkpoint or a run.

        Raises:
            UserError: as `meta_embedding_model`.
        """
        found = read_settings(resolve_model_folder(init_from), lambda _line: None) if init_from else None
        prompts, include_prompt = (found.prompts, found.include_prompt) if found else ({}, True)
        prompts = prompts if self.prompts is None else self.prompts
        include_prompt = include_prompt if self.include_prompt is None else self.include_prompt
        return {name: text for name, text in prompts.items() if name in PROMPT_NAMES}, include_prompt


class EmbeddingModel(nn.Module):
    """An encoder, pooling, a projection and normalization: `model.embed(batch)`.

    Its folders, checkpoints included, are those of `sentence_transformers`.

    Args:
        encoder: of a family here; its language-model head is removed.
        pooling: `mean`, `cls`, `last`, `weighted_mean` or `max`, see `Pooling`.
        projection: dimensions of the embeddings; a linear layer after pooling. None: those of the hidden states.
        normalize: embeddings have the length 1.
        prompts: name -> text that is put before a text, such as `{"query": "query: ", "passage": "passage: "}`.
        include_prompt: False: pooling leaves the prompt's tokens out; not with `cls`.
        max_length: tokens of a text, with prompt and special tokens; what is longer is cut. None: all of the model's
            positions.
        learnable_temperature: the temperature at the start, to be trained (CLIP); None: there is none. In training
            embeddings are multiplied by `1 / sqrt(temperature)`: their dot products are divided by it.
        similarity: how embeddings are to be compared, `cosine` or `dot`, for `sentence_transformers`.
        late_interaction: instead of pooling, every token gives a vector of its own, see `LateInteraction`; `projection`
            is its `size` then, and vectors are normalized. The folder is one of `pylate`.
        default_prompt: the name of the prompt that is used where none is asked for; None: no prompt.
        seed: of the projection's initial weights.

    Raises:
        UserError: the encoder is a decoder (code `not_an_encoder`), an unknown pooling, or a setting that is out of
            range.
    """

    causal = False

    def __init__(
        self,
        encoder: Transformer,
        *,
        pooling: str = "mean",
        projection: int | None = None,
        normalize: bool = True,
        prompts: Mapping[str, str] | None = None,
        include_prompt: bool = True,
        max_length: int | None = None,
        learnable_temperature: float | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
        late_interaction: LateInteraction | None = None,
        default_prompt: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if late_interaction is not None:
            projection, normalize = late_interaction.size, True
        if not isinstance(encoder, Transformer):
            problem = f"{type(encoder).__name__} is not an encoder of torchrecipes.models"
            raise UserError(problem, key="model", code="not_an_encoder")
        if encoder.head is not None:
            encoder.remove_head()
        self.encoder = encoder
        self.position_offset = encoder.position_offset
        self.late_interaction = late_interaction
        self.pooling = Pooling(pooling)
        positions = max_positions(encoder)
        self.max_length = positions if max_length is None else max_length
        late_length = late_interaction and max(late_interaction.query_length, late_interaction.document_length)
        if late_length and not 4 <= late_length <= positions:
            hint = f"Give 4 to {positions} tokens, the model's positions"
            raise UserError(f"{late_length} tokens", key="late_interaction", hint=hint, code="out_of_range")
        if not 1 <= self.max_length <= positions:
            hint = f"Give 1 to {positions} tokens, the model's positions"
            raise UserError(f"{max_length} tokens", key="max_length", hint=hint, code="out_of_range")
        if projection is not None and projection < 1:
            raise UserError(f"{projection} is less than 1", key="projection", code="out_of_range")
        hidden_size = encoder.config.hidden_size
        self.projection = None if projection is None else nn.Linear(hidden_size, projection)
        self.embedding_size = projection or hidden_size
        if pooling == "cls" and not include_prompt:
            raise UserError(
                "cls pools the first token, which is before the prompt: releases of sentence_transformers disagree on "
                "what is left when the prompt is taken away",
                key="include_prompt",
                hint="Set it to true, or choose another pooling",
                code="invalid_value",
            )
        self.normalize, self.include_prompt, self.similarity = normalize, include_prompt, similarity
        self.prompts, self.default_prompt = dict(prompts or {}), default_prompt
        self.prompt(default_prompt)
        if learnable_temperature is not None and learnable_temperature < math.exp(-LARGEST_LOGIT_SCALE):
            hint = "A usual temperature is 0.05"
            problem = f"{learnable_temperature} is below 0.01"
            raise UserError(problem, key="learnable_temperature", hint=hint, code="out_of_range")
        self.initial_temperature = learnable_temperature
        # One dimension: parameters without any cannot be sharded.
        self.logit_scale = None if learnable_temperature is None else nn.Parameter(torch.zeros(1))
        self.hf_adapter = EmbeddingAdapter(self)
        self._init_own_weights(seed)

    @property
    def config(self) -> Any:
        """The encoder's."""
        return self.encoder.config

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's: units of compilation, activation checkpointing and sharding."""
        return self.encoder.blocks

    @property
    def temperature(self) -> Tensor | None:
        """`[1]`, the learnable temperature; None: there is none."""
        return None if self.logit_scale is None else (-self.logit_scale.clamp(max=LARGEST_LOGIT_SCALE)).exp()

    def prompt(self, name: str | None) -> str:
        """The text of a prompt; "" for the name "", and for `query` and `passage` where the model has no prompts.

        Args:
            name: None: the default prompt's.

        Raises:
            UserError: the model has no such prompt (code `unknown_prompt`).
        """
        name = (self.default_prompt or "") if name is None else name
        if name and name not in self.prompts and name not in PROMPT_NAMES:
            known = ", ".join(self.prompts) or "none"
            raise UserError(
                f"the model has no prompt {name!r}", key="prompt", hint=f"It has: {known}", code="unknown_prompt"
            )
        return self.prompts.get(name, "") if name else ""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_type_ids: Tensor | None = None,
        *,
        num_texts: int | None = None,
        pool_from: Tensor | None = None,
        vector_positions: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of the first `num_texts` documents.

        Args:
            input_ids, position_ids, document_ids, cu_seqlens, max_seqlen: see `Transformer.forward`.
            token_type_ids: in the shape of `input_ids`. An encoder without token types ignores them.
            num_texts, pool_from: see `Pooling`.
            vector_positions: `[V]` int64, with late interaction: the tokens that give vectors, see `Batch`.

        Returns:
            `[num_texts, E]` fp32; with late interaction `[V, E]`.
        """
        documents = {"position_ids": position_ids, "document_ids": document_ids, "cu_seqlens": cu_seqlens}
        types = token_type_ids if self.hf_adapter.token_types else None
        hidden_BSD = self.encoder(input_ids, **documents, max_seqlen=max_seqlen, token_type_ids=types)
        if self.late_interaction is None:
            embeddings_ND = self.pooling(hidden_BSD, num_texts, cu_seqlens, pool_from)
        else:
            embeddings_ND = hidden_BSD.flatten(0, 1)[vector_positions].float()
        with torch.autocast(input_ids.device.type, enabled=False):
            if self.projection is not None:
                weight, bias = self.projection.weight.float(), self.projection.bias.float()
                embeddings_ND = F.linear(embeddings_ND, weight, bias)
            if self.normalize:
                embeddings_ND = F.normalize(embeddings_ND, dim=-1)
            if self.training and self.logit_scale is not None:
                scale = self.logit_scale.float().clamp(max=LARGEST_LOGIT_SCALE)
                embeddings_ND = embeddings_ND * (0.5 * scale).exp()
        return embeddings_ND

    def embed(self, batch: "Batch") -> Tensor:
        """Embeddings of the texts of a batch, `[num_texts, E]` fp32, in the order in which the batch has them.

        With late interaction the vectors of all texts, `[V, E]`.
        """
        texts = {"num_texts": batch.num_texts, "pool_from": batch.pool_from}
        return self(batch.input_ids, **batch.documents, **texts, vector_positions=batch.vector_positions)

    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value, the encoder's to those that it has alone."""
        self.encoder.init_weights(seed)
        self._init_own_weights(seed)

    @torch.no_grad()
    def _init_own_weights(self, seed: int) -> None:
        values = {}
        if self.projection is not None:
            std = self.config.hidden_size**-0.5
            for kind, parameter in self.projection.named_parameters():
                values[parameter] = init_tensor(f"projection.{kind}", tuple(parameter.shape), seed=seed, std=std)
        if self.logit_scale is not None:
            values[self.logit_scale] = torch.tensor([-math.log(self.initial_temperature)], device="cpu")
        for parameter, value in values.items():
            if not parameter.is_meta:
                copy_full(parameter, value)


class EmbeddingAdapter(HFAdapter):
    """The layout of `SentenceTransformer`: the encoder in the root as `AutoModel` saves it, and modules in folders.

    Args:
        model: has an encoder, settings and prompts.
    """

    def __init__(self, model: EmbeddingModel):
        encoder = model.encoder.hf_adapter
        super().__init__(encoder.config)
        self.encoder, self.architecture = encoder, encoder.architecture
        self.read_as(encoder)
        settings = EmbeddingSettings(
            hidden_size=model.config.hidden_size,
            pooling=model.pooling.mode,
            projection=None if model.projection is None else model.embedding_size,
            normalize=model.normalize,
            prompts=model.prompts,
            include_prompt=model.include_prompt,
            max_length=model.max_length,
            similarity=model.similarity,
            default_prompt=model.default_prompt,
            late_interaction=model.late_interaction,
        )
        self.companions = encoder.companions | settings_files(settings)
        self.is_late_interaction = model.late_interaction is not None
        self._own: KeyMap = {}
        if model.projection is not None:
            size = model.embedding_size
            folder = "2_Dense" if model.late_interaction is None else "1_Dense"
            self._own |= {f"projection.{kind}": [(f"{folder}/linear.{kind}", size)] for kind in ("weight", "bias")}
        if model.logit_scale is not None:
            self._own["logit_scale"] = [("temperature/logit_scale", 1)]
        if encoder.longer_positions is not None:
            self.longer_positions = encoder.longer_positions.under("encoder.")

    def write_keys(self) -> dict | None:
        """The encoder's config.json."""
        return self.encoder.write_keys()

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        return {f"encoder.{name}": parts for name, parts in self.encoder.key_map.items()} | self._own

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it; None: not used."""
        return name if "/" in name else self.encoder.normalize_name(name)

    def transposed(self, name: str) -> bool:
        """Whether the tensor of this Hugging Face name is stored with its two dimensions exchanged."""
        return self.encoder.transposed(name)

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Stored tensors by normalized name, with those combined that `key_map` has as one."""
        return self.encoder.prepare(stored)

    def is_head(self, name: str) -> bool:
        """Whether it is the projection or the temperature."""
        return name in self._own

    def head_of(self, name: str) -> str:
        """A folder may have a projection and no temperature."""
        return name.partition(".")[0]

    def is_constant(self, name: str) -> bool:
        """Whether the tensor of this Hugging Face name is one that the encoder's layout adds."""
        return self.encoder.is_constant(name)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor as the tensors that are stored."""
        if name in self._own:
            return super().split(name, tensor)
        return self.encoder.split(name.removeprefix("encoder."), tensor)

    def loading_hint(self, path: str) -> str:
        """How to load a folder that was saved with this adapter, in one line for people."""
        if self.is_late_interaction:
            return f"load it with pylate: pylate.models.ColBERT({path!r})"
        return f"load it with sentence_transformers: SentenceTransformer({path!r})"


def meta_embedding_model(
    path: str | Path,
    *,
    pooling: str | None = None,
    projection: int | None = None,
    normalize: bool | None = None,
    prompts: Mapping[str, str] | None = None,
    include_prompt: bool | None = None,
    max_length: int | None = None,
    learnable_temperature: float | None = None,
    similarity: Literal["cosine", "dot"] | None = None,
    late_interaction: LateInteraction | None = None,
    report: Callable[[str], None] = _print_once,
) -> EmbeddingModel:
    """The embedding model of a folder, on the meta device: `load_hf_weights` fills it.

    The folder may be one of `sentence_transformers`, this library's or anybody's, with its settings; or that of an
    encoder without any (then tokens are averaged and embeddings normalized, unless arguments say otherwise).

    Args:
        path: the folder, a checkpoint, or a run's folder (its newest valid checkpoint).
        pooling, projection, normalize, prompts, include_prompt, max_length, similarity, late_interaction: as in
            `EmbeddingModel`. None: the folder's.
        learnable_temperature: as in `EmbeddingModel`.
        report: called with each line about what is chosen or skipped. The default prints each line once per process.

    Raises:
        UserError: `unsupported_modules`: the folder has modules that do not exist here, or another projection than
            `projection`; `not_an_encoder`; or as `meta_model_from_hf`.
    """
    folder = resolve_model_folder(path)
    encoder = meta_model_from_hf(folder, report, head=False)
    found = read_settings(folder, report)
    given = {"pooling": pooling, "projection": projection, "normalize": normalize, "prompts": prompts}
    given |= {"include_prompt": include_prompt, "max_length": max_length, "similarity": similarity}
    given |= {"late_interaction": late_interaction}
    given = {name: value for name, value in given.items() if value is not None}
    if found is None:
        settings = {"pooling": "mean", "normalize": True} | given
        if pooling is None:
            report(f"{folder} has no pooling: embeddings are means of the tokens' states")
    else:
        if found.hidden_size != encoder.config.hidden_size:
            problem = f"{folder}: its pooling is for {found.hidden_size} dimensions, and its encoder has "
            raise UserError(f"{problem}{encoder.config.hidden_size}", code="unsupported_modules")
        if projection is not None and found.projection not in (None, projection):
            raise UserError(
                f"{projection} dimensions, and {folder} has a projection to {found.projection}",
                key="projection",
                hint="Leave it out, or start from the encoder alone",
                code="unsupported_modules",
            )
        settings = {name: value for name, value in found._asdict().items() if name != "hidden_size"} | given
        positions = max_positions(encoder)
        if settings["max_length"] is not None and max_length is None:
            settings["max_length"] = min(settings["max_length"], positions)
        if settings["default_prompt"] not in settings["prompts"]:
            settings["default_prompt"] = None
    with torch.device("meta"):
        return EmbeddingModel(encoder, learnable_temperature=learnable_temperature, **settings)


def load_embedding_model(
    path: str | Path, seed: int = 0, report: Callable[[str], None] = print, **settings: Any
) -> EmbeddingModel:
    """Loads an embedding model in fp32 on the CPU, in evaluation mode: `meta_embedding_model` with its weights.

    Args:
        path: see `meta_embedding_model`.
        seed: for a projection that is not in the folder.
        report: called with each line about what is chosen, skipped, dropped or initialized.
        settings: those of `meta_embedding_model`.

    Raises:
        UserError: as `meta_embedding_model` and `load_hf_weights`.
    """
    model = meta_embedding_model(path, report=report, **settings)
    model.to_empty(device="cpu")
    load_hf_weights(model, path, seed, report)
    return model.eval()
