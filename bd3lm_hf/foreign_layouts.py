"""Published block-diffusion decoders of other projects: the stock decoder of each, and how it was trained.

All of them are stock transformers decoders with remote code that no longer runs on transformers 5. Only their
`config.json` is read here: the weights have the names of the stock class, so all that they need is one of our
configurations with the contract of the checkpoint. None of their code is run.

Only functions import transformers, because its import registers the Auto classes, for which this module must already
be complete.
"""

import os
from typing import Any, NamedTuple


class Contract(NamedTuple):
    """The settings that a published checkpoint was trained with; fields of its `config.json` override them."""

    name: str
    family: str  # the stock decoder with the same weight names
    block_size: int | None
    block_size_field: str = "block_size"  # in its config.json
    mask_token_id: int | None = None  # None: the tokenizer's mask token
    alignment: str = "same"
    confidence_threshold: float = 0.9
    end_token_ids: tuple[int, ...] = ()  # in addition to those in generation_config.json
    note: str = ""


_QWEN_ENDS = (151645, 151643)  # <|im_end|> ends a turn, <|endoftext|> a document
_SDAR = Contract("SDAR", "qwen3", 4, mask_token_id=151669, end_token_ids=_QWEN_ENDS)
_OPDLM = Contract("OPDLM", "qwen3", 4, end_token_ids=_QWEN_ENDS)
_STABLE_DIFFCODER = Contract("Stable-DiffCoder", "llama", 4, mask_token_id=5, confidence_threshold=0.95)

#: Model type -> contract. The grid of blocks begins at the first token of a row in all of them, as in training.
CONTRACTS = {
    "sdar": _SDAR,
    **{
        f"a2d-{family}": Contract(
            "dllm A2D",
            family,
            32,
            end_token_ids=_QWEN_ENDS if family != "llama" else (),
            note="their sampler counts blocks from the padded prompt; here, as in their training, they are counted "
            "from the first token",
        )
        for family in ("qwen3", "qwen2", "llama")
    },
    "Fast_dLLM_Qwen": Contract(
        "Fast-dLLM v2",
        "qwen2",
        32,
        "bd_size",
        mask_token_id=151665,
        alignment="shifted_noisy",
        end_token_ids=_QWEN_ENDS,
        note="scores take the first token of a block from the noisy stream, as their training does; in generation the "
        "block before it is finished, and both streams are the same",
    ),
}

#: Model type -> why a published block-diffusion checkpoint of this type cannot be read.
UNREADABLE = {
    "sdar_moe": "it has experts, which transformers 5 stores in another layout than its files",
    "llada2_moe": "its mixture of experts is not in transformers",
    "llada": "its architecture is not in transformers",
    "Dream": "it denoises whole sequences with an architecture that is not in transformers",
    "nemotron_labs_diffusion": "its architecture is not in transformers",
    "diffusion_gemma": "transformers has its own class for it: DiffusionGemmaForBlockDiffusion",
}


def find_contract(config: dict[str, Any], source: str = "") -> Contract | None:
    """Return the contract of a `config.json`; None if it is not a published block-diffusion decoder.

    Args:
        source: folder or Hub name; only this distinguishes OPDLM from other checkpoints of its type.

    Raises:
        ValueError: if the type is known but cannot be read.
    """
    kind = config.get("model_type")
    if any("StableDiffcoder" in str(name) for name in config.get("architectures") or ()):  # a "llama" by its type
        return _STABLE_DIFFCODER
    if kind == "a2d-qwen3" and "opdlm" in source.lower():
        return _OPDLM
    if kind in UNREADABLE:
        raise ValueError(
            f"model_type={kind!r} cannot be read: {UNREADABLE[kind]}. Readable types: {', '.join(CONTRACTS)}."
        )
    return CONTRACTS.get(kind) if isinstance(kind, str) else None


def contract_config(config: dict[str, Any], source: str = "", **changes: Any) -> Any:
    """Return our configuration of a published block-diffusion decoder, or None for any other model.

    Args:
        config: its `config.json`.
        source: folder or Hub name, to read the tokenizer if neither the file nor the contract has the mask token.
        changes: fields that override both, such as `block_size`.

    Raises:
        ValueError: if the mask token is unknown, or a field has an invalid value.
    """
    from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS

    contract = find_contract(config, source)
    if contract is None:
        return None
    config_class = DECODERS[contract.family].config_class
    ignored = ("model_type", "architectures", "auto_map", contract.block_size_field, "return_dict")
    fields = {name: value for name, value in config.items() if name not in ignored}
    if fields.get("mask_token_id") is None:
        fields["mask_token_id"] = contract.mask_token_id
    if fields["mask_token_id"] is None and changes.get("mask_token_id") is None:
        fields["mask_token_id"] = _mask_of_tokenizer(source)
    fields |= {
        "block_size": config.get(contract.block_size_field) or contract.block_size,
        "alignment": contract.alignment,
        "context": "block",
    }
    rows = config.get("vocab_size")
    mask = {**fields, **changes}["mask_token_id"]
    if isinstance(rows, int) and isinstance(mask, int) and not 0 <= mask < rows:
        raise ValueError(
            f"mask_token_id={mask} is outside the embedding of {rows} rows: this is a damaged {contract.name} "
            f"checkpoint, or one with another mask token."
        )
    return config_class.from_dict({**fields, **changes})


def read_contract(name: str) -> Contract | None:
    """Return the contract of a folder or Hub name; None if it is not a published block-diffusion decoder."""
    return find_contract(_read_config_dict(name), name)


def read_contract_config(name: str, *, files: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Return our configuration of a folder or Hub name; None if it is not a published block-diffusion decoder.

    Args:
        files: options that choose the files of `name`, such as `revision`.
        changes: as in [`contract_config`].

    Raises:
        ValueError: as in [`contract_config`].
    """
    return contract_config(_read_config_dict(name, **files or {}), name, **changes)


def _read_config_dict(name: str, **files: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        config = PreTrainedConfig.get_config_dict(name, **files)[0]
    except OSError:  # a missing file is reported by the caller's own loading
        return {}
    except RecursionError as error:
        raise ValueError(f"The config.json of {name} is nested too deeply.") from error
    return config if isinstance(config, dict) else {}


def _mask_of_tokenizer(source: str) -> int:
    """Return the id of the tokenizer's mask token; `AutoTokenizer` would need the configuration to load it."""
    from transformers import PreTrainedTokenizerFast

    try:
        found = PreTrainedTokenizerFast.from_pretrained(source).mask_token_id
    except Exception:  # a damaged file makes the libraries raise nearly anything
        found = None
    if found is None:
        raise ValueError(
            f"The mask token of {source} is unknown: mask_token_id is not in its config.json, and its tokenizer has "
            f"no mask token. Name it with --mask-token-id."
        )
    return found


def adopt_published_decoding(model: Any, name: str | os.PathLike[str]) -> None:
    """Set the defaults of `generate` to the decoding that the checkpoint `name` was published with, in place.

    A checkpoint in our own layout has its own generation config, which is left as it is.
    """
    contract = read_contract(str(name))
    if contract is None:
        return
    own = model.generation_config.to_diff_dict()
    own |= {"sampler": "confidence", "confidence_threshold": contract.confidence_threshold}
    ends = own.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    more = [token for token in contract.end_token_ids if token not in ends and token < model.config.vocab_size]
    if more:
        own["eos_token_id"] = [*ends, *more]
    own.pop("transformers_version", None)
    model.generation_config = model.generation_config_class(**own)


def decoder_layout_config(model: Any, layout: str) -> dict[str, Any]:
    """Return the `config.json` of a decoder of ours in the layout `"sdar"` or `"stock"`.

    Raises:
        ValueError: if the model does not meet a condition of the layout, with that condition.
    """
    from bd3lm_hf.modeling.configuration_bd3lm_decoders import BD3LMDecoderConfigMixin

    config = model.config
    if not isinstance(config, BD3LMDecoderConfigMixin):
        raise ValueError(
            f"--to {layout}: model_type={config.model_type!r} is not a decoder of transformers. Name a model that was "
            f"adapted from one, by `bd3lm train --init_from DECODER`."
        )
    own = set(BD3LMDecoderConfigMixin.__dataclass_fields__) | {"auto_map", "requires_transformers"}
    fields = {name: value for name, value in config.to_dict().items() if name not in own}
    if layout == "sdar":
        # SGLang hard-codes the mask token, and aligns blocks with the start of the prompt, as we do.
        _check_conditions(config, layout, {"model_type": "bd3lm_qwen3", "alignment": "same", "context": "block"})
        _check_conditions(config, layout, {"mask_token_id": _SDAR.mask_token_id})
        # Its readers expect the form of transformers 4; without rope_theta they assume 10,000.
        rope = dict(fields.pop("rope_parameters"))
        fields |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": fields.pop("dtype")}
        fields["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
        kind = {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}
        return fields | kind | {"block_size": config.block_size, "mask_token_id": config.mask_token_id}
    _check_conditions(config, layout, {"context": "token"})
    if config.alignment == "same" and not config.ar_loss_weight:
        raise ValueError(
            "--to stock: alignment='same' without ar_loss_weight trains the head to predict a token at its own "
            "position, so the weights are not autoregressive. Train with an ar_loss_weight, or alignment='shifted'."
        )
    stock_class: Any = type(model).__bases__[-1]
    return fields | {"model_type": stock_class.config_class.model_type, "architectures": [stock_class.__name__]}


def _check_conditions(config: Any, layout: str, conditions: dict[str, Any]) -> None:
    for name, required in conditions.items():
        if getattr(config, name) != required:
            raise ValueError(
                f"--to {layout} needs {name}={required!r}, but SRC has {getattr(config, name)!r}: adapt and train a "
                f"model with that value."
            )


def contract_config_classes() -> dict[str, Any]:
    """Return a class for `AutoConfig` by model type, whose `from_dict` returns our configuration of such a decoder."""
    from transformers import PreTrainedConfig

    def make(kind: str) -> Any:
        def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            ours = contract_config({**config_dict, "model_type": kind}, str(kwargs.get("name_or_path") or ""))
            return type(ours).from_dict(ours.to_dict(), **kwargs)

        fields = {"model_type": kind, "from_dict": classmethod(from_dict), "__module__": __name__}
        return type(f"{CONTRACTS[kind].family.title()}ContractConfig", (PreTrainedConfig,), fields)

    return {kind: make(kind) for kind in CONTRACTS}
