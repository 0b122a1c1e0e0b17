"""`bd3lm convert SRC DST`: convert a published or Lightning checkpoint to a self-contained folder, and back.

1. Read weights, configuration and tokenizer of the source, without running any of its code.
2. Choose the weights: the exponential moving average if there is one, as in the published checkpoints.
3. Make the configuration; missing fields are inferred from the weights, and printed.
4. Load the weights into a model of that type; a missing or unexpected weight is an error.
5. Save, load the result, and compare the logits.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

import bd3lm_hf  # noqa: F401  (registers the model types)
from bd3lm_hf.adapt import adapt_decoder, is_adaptable, load_decoder_tokenizer
from bd3lm_hf.checkpoints import check_finite_weights, load_model, read_config
from bd3lm_hf.console import printable
from bd3lm_hf.foreign_layouts import CONTRACTS, decoder_layout_config, read_contract, read_contract_config
from bd3lm_hf.hub_upload.layouts import BUFFERS, WEIGHT_FILES, Architecture, Source, architecture_of, read_source
from bd3lm_hf.hub_upload.repo_files import check_links, new_folder
from bd3lm_hf.tokenization import check_tokenizer_fits, has_tokenizer, limit_to_window, load_tokenizer


# The fields of a published config.json, with the authors' names and in the order of their export script.
_PUBLISHED_FIELDS = (
    *("block_size", "vocab_size", "model_length", "cross_attn", "adaln", "causal", "hidden_dim", "cond_dim"),
    *("n_blocks", "n_heads", "dropout", "time_conditioning", "var_min", "sampling_eps_min", "sampling_eps_max"),
)
# The tokenizers of the published checkpoints, by the size of the vocabulary, including the mask token.
_KNOWN_TOKENIZERS = {50258: "gpt2", 30522: "bert-base-uncased"}


class Conversion(NamedTuple):
    """The result of a conversion."""

    model_type: str
    num_parameters: int
    notes: list[str]  # what was inferred, chosen or left out

    @classmethod
    def of(cls, model: Any, notes: list[str]) -> "Conversion":
        """Return the result for a converted model."""
        return cls(model.config.model_type, sum(parameter.numel() for parameter in model.parameters()), notes)


def convert(
    source: str,
    target: str | Path,
    *,
    weights: str = "auto",
    tokenizer: str | None = None,
    model_type: str | None = None,
    **process_fields: Any,
) -> Conversion:
    """Convert a checkpoint to a folder for `from_pretrained`, with its code.

    Args:
        source: a folder with `config.json` and weights, the name of a Hub repository, or a Lightning `.ckpt` file. A
            masked language model with the layers of SSD-LM next to it becomes one model. Decoders of
            [`bd3lm_hf.foreign_layouts`] become ours under the weight names of their stock class.
        target: folder to write; it must be empty or not exist.
        weights: weights to take from a `.ckpt` file: `"ema"`, `"raw"`, or `"auto"`, the average if there is one.
        tokenizer: folder or name, if the source has none.
        model_type: `bd3lm`, `ar`, `mdlm` or `sedd`, if the source does not determine it.
        process_fields: `block_size` and `mask_token_id` of a decoder. Published block-diffusion decoders have them
            in their files; an autoregressive decoder, which is adapted, by default gets blocks of 4 and a mask token.

    Raises:
        ValueError: if the source cannot be read, weights are missing, unexpected or not finite, the model type
            contradicts the weights, or the target is in use.
    """
    config = None if Path(source).expanduser().is_file() else read_contract_config(source, **process_fields)
    if config is not None:
        return _convert_decoder(source, Path(target), tokenizer, config)
    if _is_decoder(source):
        return _adapt(source, Path(target), tokenizer, process_fields)
    if process_fields:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in process_fields)
        raise ValueError(f"{names}: only the decoders of {', '.join(CONTRACTS)} take it. Leave it out.")
    return _convert_published(source, Path(target), weights, tokenizer, model_type)


def _convert_published(
    source: str, target: Path, requested: str, tokenizer: str | None, model_type: str | None
) -> Conversion:
    """Convert a checkpoint of the authors' code, or of SSD-LM."""
    with new_folder(target, "DST") as folder:
        # 1. Read
        found = read_source(source)
        # 2. Weights
        tensors, notes = _choose_weights(found, requested)
        # 3. Configuration
        architecture = found.architecture or architecture_of(tensors, found.config, model_type)
        if model_type not in (None, architecture.model_type):
            raise ValueError(
                f"--model-type {model_type}: {source} is in the layout of {architecture.model_type}. Leave it out."
            )
        loaded_tokenizer = _load_tokenizer(found.folder, tokenizer)
        config = _make_config(architecture, loaded_tokenizer)
        # 4. Load
        model = AutoModelForCausalLM.from_config(config).eval()
        _load_weights(model, tensors, source)
        check_finite_weights(model, source)
        # 5. Save and check
        _save_checked(model, loaded_tokenizer, folder)
    if loaded_tokenizer is None:
        name = _KNOWN_TOKENIZERS.get(config.vocab_size)
        hint = f"--tokenizer {name} is the one of the published checkpoints" if name else "name it with --tokenizer"
        notes.append(f"SRC has no tokenizer, and DST cannot read text without the one it was trained with: {hint}")
    return Conversion.of(model, [*notes, *architecture.notes])


def _convert_decoder(source: str, target: Path, tokenizer: str | None, config: Any) -> Conversion:
    """Convert a published block-diffusion decoder: a stock decoder with a contract, see [`foreign_layouts`]."""
    contract = read_contract(source)
    assert contract is not None
    with new_folder(target, "DST") as folder:
        if Path(source).is_dir():
            check_links(Path(source), "SRC")
        # `load_model` refuses missing, unexpected and misshapen weights: the names are those of the stock class.
        model = load_model(source, argument="SRC", config=config).eval()
        loaded_tokenizer = _load_tokenizer(Path(source), tokenizer)
        if loaded_tokenizer is not None:
            check_tokenizer_fits(loaded_tokenizer, config)
        _save_checked(model, loaded_tokenizer, folder)
    notes = [
        f"{contract.name} on {contract.family}: block_size={config.block_size}, mask_token_id={config.mask_token_id}, "
        f"alignment={config.alignment!r}, sampler='confidence' with a threshold of {contract.confidence_threshold}"
    ]
    notes += [note for note in (contract.note,) if note]
    if loaded_tokenizer is None:
        notes.append("SRC has no tokenizer: name the one it was trained with, using --tokenizer")
    return Conversion.of(model, notes)


def to_decoder(source: str, target: str | Path, layout: str) -> Conversion:
    """Write a decoder of ours in the layout of SDAR, or as the plain autoregressive decoder.

    The weights are those of the folder, bit for bit; only `config.json` and `generation_config.json` differ.

    Args:
        layout: `"sdar"`, which SGLang and LMDeploy serve, or `"stock"`.

    Raises:
        ValueError: if the model does not meet the conditions of the layout; the message names them.
    """
    with new_folder(Path(target), "DST") as folder:
        model = load_model(source, argument="SRC")
        config = decoder_layout_config(model, layout)
        model.save_pretrained(folder)
        for path in folder.glob("*.py"):
            path.unlink()
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        special = {name: getattr(model.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        GenerationConfig(**{f"{name}_token_id": value for name, value in special.items()}).save_pretrained(folder)
        tokenizer = _load_tokenizer(Path(source))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Conversion.of(model, [])._replace(model_type=config["model_type"])


def _is_decoder(source: str) -> bool:
    """Return whether a folder or hub name is that of a transformers decoder that can be adapted."""
    if Path(source).expanduser().is_file():
        return False
    try:
        return is_adaptable(AutoConfig.from_pretrained(source))
    except Exception:  # another layout, or damaged, which reading the source reports
        return False


def _adapt(source: str, target: Path, tokenizer: str | None, fields: dict[str, Any]) -> Conversion:
    """Convert an autoregressive decoder of transformers; the result still has to be trained."""
    config = read_config(source, argument="SRC")
    with new_folder(target, "DST") as folder:
        loaded = load_decoder_tokenizer(tokenizer or source, config, fields.get("mask_token_id"))
        model = adapt_decoder(source, tokenizer=loaded, **fields).eval()
        _save_checked(model, loaded, folder)
    notes = [f"mask token: {loaded.mask_token}, id {model.config.mask_token_id}", "train it before use: --init_from"]
    return Conversion.of(model, notes)


def to_published(source: str, target: str | Path) -> Conversion:
    """Write a BD3-LM of ours in the published layout, for the authors' code.

    The weights have the same names. The authors' code is not included: copy `configuration_bd3lm.py` and
    `modeling_bd3lm.py` from one of their repositories into the folder.

    Raises:
        ValueError: if the model is not a BD3-LM, or the target is in use.
    """
    with new_folder(Path(target), "DST") as folder:
        model = load_model(source, argument="SRC")
        if model.config.model_type != "bd3lm":
            raise ValueError(
                f"--to published: SRC {source} has model_type={model.config.model_type!r}, but the published layout "
                f"is that of bd3lm."
            )
        config = json.dumps(_published_config(model), indent=2, sort_keys=True)
        (folder / "config.json").write_text(f"{config}\n", encoding="utf-8")
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
        tokenizer = _load_tokenizer(Path(source))
        if tokenizer is not None:
            limit_to_window(tokenizer, model.config)
            tokenizer.save_pretrained(folder)
    notes = ["copy the authors' configuration_bd3lm.py and modeling_bd3lm.py into it"]
    if model.config.noise != "loglinear":
        notes.append(f"noise={model.config.noise!r} has no field there; their code trains with loglinear noise")
    if model.config.mask_token_id != model.config.vocab_size - 1:
        notes.append(
            f"mask_token_id={model.config.mask_token_id} has no field there; their code takes the tokenizer's"
        )
    return Conversion.of(model, notes)


def _published_config(model: Any) -> dict[str, Any]:
    config = {name: getattr(model.config, name) for name in _PUBLISHED_FIELDS}
    # The interval in the weights is the one that training ended with.
    config |= dict(zip(("sampling_eps_min", "sampling_eps_max"), model.interval(), strict=True))
    return config | {
        "architectures": ["BD3LM"],
        "attn_backend": model.config.attn_backend or "sdpa",
        "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
        "model_type": "bd3lm",
        "return_dict": False,
        "torch_dtype": "float32",
    }


# Weights


def _choose_weights(source: Source, requested: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    if requested not in ("auto", "ema", "raw"):
        raise ValueError(f"weights={requested!r}: choose 'ema', 'raw' or 'auto'.")
    if source.average is None:
        if requested == "ema":
            raise ValueError("--weights ema: this checkpoint has no moving average. Leave --weights out.")
        return source.weights, []
    if requested == "raw":
        return source.weights, ["the raw weights were taken, not their moving average"]
    # The average is a list without names, in the order of the backbone's parameters, which is that of the weights.
    names = [name for name in source.weights if name.startswith("backbone.") and not name.endswith(BUFFERS)]
    if len(names) != len(source.average) or not all(isinstance(t, torch.Tensor) for t in source.average):
        raise ValueError(
            f"The moving average has {len(source.average)} tensors for {len(names)} parameters: take the raw "
            f"weights with --weights raw."
        )
    averaged = dict(source.weights)
    for name, shadow in zip(names, source.average, strict=True):
        if shadow.shape != averaged[name].shape:
            raise ValueError(
                f"The moving average of {name} has the shape {tuple(shadow.shape)} instead of "
                f"{tuple(averaged[name].shape)}: take the raw weights with --weights raw."
            )
        averaged[name] = shadow
    return averaged, ["the exponential moving average of the weights was taken (--weights raw takes the raw ones)"]


def _load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    try:
        model.load_state_dict(_under_every_name(model.state_dict(), weights))
    except RuntimeError as error:  # it lists missing, unexpected and misshapen weights
        raise ValueError(
            f"The weights of {source} do not fit. {error} If that is the wrong type, name the right one with "
            f"--model-type."
        ) from error


def _under_every_name(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under all names of each tied tensor; a checkpoint may have only one of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        # Tied tensors share their memory.
        names.setdefault(tensor.data_ptr(), []).append(name)
    tied = dict(weights)
    for same in names.values():
        present = [name for name in same if name in weights]
        if any(not torch.equal(weights[present[0]], weights[name]) for name in present[1:]):
            raise ValueError(f"The weights {' and '.join(present)} differ, but the model ties them.")
        tied |= {name: weights[present[0]] for name in same if present}
    return tied


# Configuration and tokenizer


def _make_config(architecture: Architecture, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    fields = dict(architecture.fields)
    if tokenizer is not None:
        for name in ("bos", "eos", "pad", "mask"):
            value = getattr(tokenizer, f"{name}_token_id")
            if value is not None and value < fields["vocab_size"]:
                fields.setdefault(f"{name}_token_id", value)
    config: Any = AutoConfig.for_model(architecture.model_type, **fields)
    if tokenizer is not None:
        check_tokenizer_fits(tokenizer, config)
    return config


def _load_tokenizer(folder: Path | None, name: str | None = None) -> PreTrainedTokenizerBase | None:
    if name is not None:
        return load_tokenizer(name)
    if folder is not None and has_tokenizer(folder):
        return load_tokenizer(str(folder))
    return None


# Write


@torch.no_grad()
def _save_checked(model: Any, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save, load again, and compare with the model in memory."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        limit_to_window(tokenizer, model.config)
        tokenizer.save_pretrained(folder)
    inputs = dict(model.dummy_inputs)
    if (mask := getattr(model.config, "mask_token_id", None)) is not None:
        # The model warns about a text without a mask token.
        inputs["input_ids"] = inputs["input_ids"].index_fill(1, torch.tensor([1], device=model.device), mask)
    logits = model(**inputs).logits
    loaded = load_model(str(folder), argument="the converted folder").eval()
    states = (list(each.state_dict().values()) for each in (model, loaded))
    same = all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True))
    # Kernels may round differently for weights at another address in memory.
    if not same or not torch.allclose(logits, loaded(**inputs).logits, atol=1e-4):
        raise ValueError("The saved folder does not load as the model that was converted, so DST was not written.")


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm convert`."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if arguments.to == "published":
        done = to_published(arguments.source, arguments.target)
    elif arguments.to != "bd3lm_hf":
        done = to_decoder(arguments.source, arguments.target, arguments.to)
    else:
        given = {name: getattr(arguments, name) for name in ("weights", "tokenizer", "model_type")}
        given |= {name: getattr(arguments, name) for name in ("block_size", "mask_token_id")}
        options = {name: value for name, value in given.items() if value is not None}
        done = convert(arguments.source, arguments.target, **options)
    for note in done.notes:
        print(f"note: {printable(note)}")
    checked = "; logits checked after loading" if arguments.to == "bd3lm_hf" else ""
    print(f"{arguments.target}: {done.model_type}, {done.num_parameters:,} parameters{checked}")
