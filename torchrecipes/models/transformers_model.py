"""`from_transformers`: trains any causal or masked language model of `transformers`, an optional dependency.

The class of `transformers` computes the hidden states, and its output layer becomes `model.head`, so that losses work
on selected positions. Packed rows get a block-diagonal mask. Checkpoints are what `save_pretrained` writes.
"""

import hashlib
import importlib.util
import inspect
import json
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models.config_json import read_json
from torchrecipes.models.experts import stack_single_experts
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.stored_tensors import StoredTensor
from torchrecipes.modules import LMHead
from torchrecipes.modules.attention_backend import document_ids_from
from torchrecipes.modules.init import copy_full
from torchrecipes.torchao_import import import_torchao

_DERIVED = (".position_ids", ".token_type_ids", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def from_transformers(
    path: str | None = None, *, vocab_size: int | None = None, causal: bool | None = None, seed: int = 0, **keys: Any
) -> "TransformersModel":
    """A model of `transformers` with initial weights; pretrained ones are loaded by the recipe's `init_from`.

    Args:
        path: a folder whose `config.json` describes the architecture. None: `keys` do.
        vocab_size: rows of the embedding. None: as configured.
        causal: whether it predicts the next token. None: by `architectures` in the config, else by the model type.
        seed: of the initial weights, which are a function of (seed, name of the layer).
        keys: of the model's config, such as `model_type=llama, hidden_size=256`; with `path` they change its config.

    Raises:
        UserError: `missing_package`; `unknown_model_type` that `transformers` does not have itself (code in a folder
            is never run); `unsupported_model` whose output is not a linear layer of hidden states.
    """
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        hint = "pip install 'torchrecipes[transformers]'"
        raise UserError("from_transformers needs transformers", hint=hint, code="missing_package") from None
    if importlib.util.find_spec("torchao"):
        with suppress(ModuleNotFoundError):  # transformers imports it, too, and lets it print its warnings
            import_torchao("prototype.mx_formats")
    if path is not None:
        keys = read_json(resolve_model_folder(path) / "config.json") | keys
    model_type = keys.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        hint = "Give path, or model_type and the keys of its config"
        problem = f"model_type {model_type!r} is not one that transformers has"
        raise UserError(problem, key="model_type", hint=hint, code="unknown_model_type")
    if vocab_size is not None:
        keys["vocab_size"] = vocab_size
    architecture = (keys.get("architectures") or [""])[0]
    config_class = CONFIG_MAPPING[model_type]
    try:
        defaults = vars(config_class())
        rows = keys.get("vocab_size", defaults.get("vocab_size"))
        for name, token in defaults.items():
            if name.endswith("_token_id") and isinstance(token := keys.get(name, token), int) and token >= rows:
                keys[name] = None  # a default beyond a small vocabulary
        config = config_class.from_dict(keys)
    except (TypeError, ValueError) as error:
        raise UserError(f"{model_type}: {error}", key="model", code="unsupported_config") from None
    return TransformersModel(config, _model_class(config, architecture, causal), seed=seed)


class TransformersModel(nn.Module):
    """A language model of `transformers` that gives hidden states, and logits by `head`.

    Attributes:
        config: of `transformers`.
        model: the `transformers` module, whose output layer passes hidden states on.
        head: the output layer, an `LMHead`.
        blocks: the model's layers, where there is a list of them.
        causal: whether a token sees only the tokens before it.
        hf_adapter: stores the model as `save_pretrained` does.
        routing, router_loss: None and 0.0; auxiliary losses of routers are not computed.

    Args:
        config: of `transformers`.
        model_class: for causal or masked language models.
        seed: of the initial weights.
    """

    def __init__(self, config: Any, model_class: type, *, seed: int = 0):
        super().__init__()
        config.use_cache = False
        self.config, self._model_class = config, model_class
        self.causal = model_class.__name__ not in _masked_classes()
        self.model = self._build()
        self._output_name, output = _output_layer(self.model)
        names = {
            id(parameter): name
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{self._output_name}.")
        }
        tied, bias = names.get(id(output.weight)), names.get(id(output.bias))
        tie_to = self.model.get_submodule(tied.rpartition(".")[0]) if tied else None
        self.head = LMHead(output.in_features, output.out_features, tie_to=tie_to, bias=output.bias is not None)
        self.model.set_submodule(self._output_name, _PassOn(self.head))
        if bias:  # BERT has it beside the layer, too
            self.model.get_submodule(bias.rpartition(".")[0]).register_parameter(bias.rpartition(".")[2], None)
        self._blocks_name = _longest_list(self.model)
        self.routing, self.router_loss = None, 0.0
        self.hf_adapter = TransformersAdapter(
            self, tied=(f"{self._output_name}.weight", tied) if tied else None, bias=bias
        )
        self.init_weights(seed)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: units of compilation, activation checkpointing and sharding."""
        return self.model.get_submodule(self._blocks_name) if self._blocks_name else nn.ModuleList()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,  # noqa: ARG002, masks do not need it
    ) -> Tensor:
        """What `model.head` makes logits of: hidden states, after the transform of a masked-LM head.

        Args:
            input_ids: `[B, S]` integers.
            position_ids: `[B, S]` or `[1, S]`, each token's position in its document. None: 0 to S - 1 in every row.
            document_ids: `[B, S]`, the number of each token's document in its row. None: as `cu_seqlens` says.
            cu_seqlens: `[documents + 1]`, document boundaries over the B * S flattened tokens. None: every row is one
                document.
            max_seqlen: not used.

        Returns:
            `[B, S, D]`.

        Raises:
            UserError: `no_packing`: several documents in a row, which the model cannot separate.
        """
        inputs = {"input_ids": input_ids}
        if document_ids is None and cu_seqlens is not None:
            document_ids = document_ids_from(cu_seqlens, tuple(input_ids.shape))
        if document_ids is not None:
            inputs["attention_mask"] = self._mask(document_ids)
        if self._takes_positions and position_ids is not None:
            inputs["position_ids"] = position_ids + self.position_offset
        return self.model(**inputs).logits

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets parameters and buffers to what `transformers` starts them from; those on the meta device stay.

        A copy of the model is made on the meta device and initialized layer by layer on the CPU.
        """
        ours = dict(self.named_parameters()) | dict(self.named_buffers())
        if all(tensor.is_meta for tensor in ours.values()):
            return
        stored = {parts[0][0]: name for name, parts in self.hf_adapter.key_map.items()}
        with torch.device("meta"):
            fresh = self._build()
        units = []
        if self._blocks_name:
            layers = fresh.get_submodule(self._blocks_name)
            units = [(f"{self._blocks_name}.{number}.", layer) for number, layer in enumerate(layers)]
            fresh.set_submodule(self._blocks_name, nn.ModuleList())
        for prefix, unit in [*units, ("", fresh)]:
            digest = hashlib.blake2b(f"{seed}/{prefix}".encode(), digest_size=8).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest, "little") >> 1)
                unit.to_empty(device="cpu").apply(fresh._init_weights)
            for name, value in [*unit.named_parameters(), *unit.named_buffers()]:
                name = f"{prefix}{name}"
                target = ours.get(stored.get(name, f"model.{name}"))
                if target is not None and not target.is_meta:
                    copy_full(target, value)
            unit.to("meta")

    def _build(self) -> nn.Module:
        try:
            model = self._model_class._from_config(self.config, dtype=torch.float32, attn_implementation="sdpa")
        except ValueError:  # its attention has no such kernel
            model = self._model_class._from_config(self.config, dtype=torch.float32, attn_implementation="eager")
        model.tie_weights()
        return model

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @cached_property
    def position_offset(self) -> int:
        """The first position: RoBERTa's begin after the id of padding."""
        for module in self.model.modules():
            if hasattr(module, "create_position_ids_from_input_ids"):
                return module.padding_idx + 1
        return 0

    def _mask(self, document_ids: Tensor) -> Tensor | dict[str, Tensor]:
        """The mask by which a token sees its own document; one for each kind of layer where there are several."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        separable = self.model._supports_sdpa and self._takes_positions and not self.model._is_stateful
        if not separable or not kinds <= {"full_attention", "sliding_attention"}:
            return self._padding_mask(document_ids)
        position = torch.arange(document_ids.shape[1], device=document_ids.device)
        distance = position[:, None] - position[None, :]
        full = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
        if self.causal:
            full = full & (distance >= 0)
        window = getattr(self.config, "sliding_window", None)
        if window is None or kinds == {"full_attention"}:
            return full
        # Causal windows of `transformers` count the token itself; the others are on both sides of it.
        sliding = full & ((distance < window) if self.causal else (distance.abs() <= window))
        return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding

    def _padding_mask(self, document_ids: Tensor) -> Tensor:
        """The first document of each row; a second one is padding."""
        number = document_ids - document_ids[:, :1]
        if int(number.max()) > 1:
            raise UserError(
                f"the attention of {self.config.model_type} cannot separate the documents of a packed row",
                key="data.packing",
                hint="Set data.packing=none",
                code="no_packing",
            )
        return (number == 0).long()


class _PassOn(nn.Identity):
    """In the place of the output layer; some models look at its weight's dtype."""

    def __init__(self, head: LMHead):
        super().__init__()
        self._head = (head,)  # in a tuple: as an attribute it would become a submodule

    @property
    def weight(self) -> Tensor:
        """The head's."""
        return self._head[0].weight


class TransformersAdapter(HFAdapter):
    """The layout of `save_pretrained`: the names of `transformers`, and its config."""

    def __init__(self, model: TransformersModel, tied: tuple[str, str] | None, bias: str | None):
        super().__init__(model.config)
        self.tied, self._output_name, self._class = tied, model._output_name, model._model_class
        self._body = f"{self._class.base_model_prefix}."
        self.key_map: KeyMap = {
            name: [(name.removeprefix("model."), tensor.shape[0] if tensor.dim() else 0)]
            for name, tensor in model.state_dict().items()
            if name.startswith("model.")
        }
        if model.head.decoder is not None:
            self.key_map["head.decoder.weight"] = [(f"{self._output_name}.weight", len(model.head.weight))]
        if model.head.bias is not None:
            self._bias = bias or f"{self._output_name}.bias"
            self.key_map["head.bias"] = [(self._bias, len(model.head.bias))]
        self.keeps_pad_id = model.position_offset > 0
        self._known = {parts[0][0] for parts in self.key_map.values()}

    @property
    def architecture(self) -> str:
        """The class that reads the folder."""
        return self._class.__name__

    def write_keys(self) -> dict:
        """The config as `save_pretrained` writes it."""
        keys = json.loads(self.config.to_json_string())
        return {key: value for key, value in keys.items() if key not in ("architectures", "dtype")}

    def stored_shape(self, part: tuple[str, int], shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        """The same shape."""
        return shape

    def is_head(self, name: str) -> bool:
        """Whether it is outside of the body, which `AutoModel` saves without a head."""
        return not self.key_map[name][0][0].startswith(self._body)

    def normalize_name(self, name: str) -> str | None:
        """Names with or without the prefix of the body; poolers and what can be computed are not used."""
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name == f"{self._output_name}.bias":
            return getattr(self, "_bias", name)
        if name in self._known:
            return name
        full = name if name.startswith(self._body) else f"{self._body}{name}"
        if full in self._known:
            return full
        unused = full.endswith(_DERIVED) or full.startswith((f"{self._body}pooler.", f"{self._body}cls.seq_rel"))
        return None if unused else name

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Stacks experts that are stored one by one."""
        return stack_single_experts(stored)


def _masked_classes() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())


def _model_class(config: Any, architecture: str, causal: bool | None) -> type:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    mappings = {True: MODEL_FOR_CAUSAL_LM_MAPPING, False: MODEL_FOR_MASKED_LM_MAPPING}
    classes = {kind: mapping[type(config)] for kind, mapping in mappings.items() if type(config) in mapping}
    if causal is None:
        named = [kind for kind, model_class in classes.items() if model_class.__name__ == architecture]
        causal = named[0] if named else False not in classes
    if causal not in classes or config.is_encoder_decoder:
        kind = "causal" if causal else "masked"
        problem = f"transformers has no {kind} language model of type {config.model_type}"
        raise UserError(problem, key="model", code="unsupported_model")
    if causal and False in classes and hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT and its kin see later tokens otherwise
    return classes[causal]


def _output_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    output = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is output), None)
    # What comes after the layer would be applied to hidden states.
    if not isinstance(output, nn.Linear) or getattr(model.config, "final_logit_softcapping", None):
        problem = f"the logits of {type(model).__name__} are more than a linear layer of its hidden states"
        raise UserError(problem, key="model", code="unsupported_model")
    return name, output


def _longest_list(model: nn.Module) -> str | None:
    """The name of the list of layers."""
    layers = getattr(model.config, "num_hidden_layers", None)
    lists = (
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers
    )
    return next(lists, None)
