"""The model card: what a model is, what it was trained on and how well it does, from the files that its run left.

The metadata are huggingface_hub's `ModelCardData`, with the held-out perplexity in the form of a model index.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bd3lm_hf.data.sources import DEFAULT_DATASET, exists, find_spec, looks_like_path
from bd3lm_hf.run_folder import RECIPE_NAME, RESULTS_NAME, WEIGHTS_NAME
from bd3lm_hf.yaml_files import read_yaml


TEMPLATE = Path(__file__).parent / "model_card.md"
_CITATION = """\
@inproceedings{arriola2025block,
  title     = {Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models},
  author    = {Marianne Arriola and Aaron Gokaslan and Justin T. Chiu and Zhihan Yang and Zhixuan Qi and Jiaqi Han and
               Subham Sekhar Sahoo and Volodymyr Kuleshov},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.09573}
}"""
# What a recipe may tell the world. All else may hold folders, names of machines and logins.
_TRAINING = {
    "max_steps": "optimizer steps asked for",
    "num_train_epochs": "epochs asked for",
    "optim": "optimizer",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule of the learning rate",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "largest gradient norm",
    "bf16": "bfloat16",
    "fp16": "float16",
    "packing": "packing",
    "lora_r": "rank of the adapter",
    "lora_alpha": "alpha of the adapter",
}
_FACTS = {
    "model_type": "model type",
    "block_size": "block size",
    "max_position_embeddings": "tokens of a training sequence",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "attention heads",
    "vocab_size": "vocabulary",
    "noise": "noise schedule",
}
_METRICS = {"perplexity": "Perplexity", "nll": "Nats per token", "bits_per_byte": "Bits per byte", "loss": "Loss"}


def make_card(
    model: Any,
    source: Path,
    repo_id: str,
    *,
    tokenizer: bool = True,
    base: str | None = None,
    decay: float | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of a model.

    Args:
        source: the folder that it comes from: its `recipe.yaml`, `results.json` and `weights.json` are read where they
            are there. A checkpoint takes the recipe of its run.
        repo_id: what the snippets load.
        tokenizer: whether one lies beside the model.
        base: repository of the base model of an adapter.
        decay: of the average that stands for a checkpoint's weights, as which `weights.json` does not know it.
        license: as the hub calls it, such as "apache-2.0".
    """
    found, results = _read_run(source)
    recipe = found or {}
    averaged = {"weights": "average", "ema_decay": decay}
    weights = _read_json(source / WEIGHTS_NAME) if decay is None else averaged
    dataset = None if found is None else str(recipe.get("dataset") or DEFAULT_DATASET)
    hub_dataset = _hub_dataset(dataset) if dataset else None
    whole = model.get_base_model() if base else model
    likelihood = whole.has_likelihood
    scores = _eval_results(recipe, results, dataset, hub_dataset) or None
    data = ModelCardData(
        license=license,
        language=list(language) if language is not None and not isinstance(language, str) else language,
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        datasets=[hub_dataset] if hub_dataset else None,
        tags=[model.config.model_type, "diffusion-language-model", "arxiv:2503.09573", *tags],
        model_name=repo_id.split("/")[-1] if scores else None,
        eval_results=scores,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        summary=(type(whole).__doc__ or "").split("\n")[0],
        table=_table(_facts(model, whole)),
        base=base,
        tokenizer=tokenizer,
        likelihood=likelihood,
        bound=likelihood and not whole.exact_likelihood,
        training=_training(recipe, results, weights),
        data=_data(dataset, hub_dataset),
        evaluation=_evaluation(results),
        window=_window(whole.config),
        citation=_CITATION,
    )


# Reading what a run left


def _read_run(source: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Recipe (None without a run) and results of the run of a folder; a checkpoint has no results of its own."""
    if (source / RECIPE_NAME).is_file():
        return _read_recipe(source / RECIPE_NAME), _read_json(source / RESULTS_NAME)
    if (source.parent / RECIPE_NAME).is_file():
        return _read_recipe(source.parent / RECIPE_NAME), {}
    return None, {}


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is no YAML, so the model card can not be filled: {error}") from error
    return recipe if isinstance(recipe, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, so the model card can not be filled: {error}") from error
    return content if isinstance(content, dict) else {}


def _is_local(name: str) -> bool:
    return exists(name) or looks_like_path(name)


def _hub_dataset(name: str) -> str | None:
    """The repository of a data set; None for embedded text and files."""
    if _is_local(name):
        return None
    try:
        return find_spec(name).path
    except ValueError:
        return None


# Sections


def _facts(model: Any, whole: Any) -> list[tuple[str, Any]]:
    config = whole.config
    rows = [(label, getattr(config, name, None)) for name, label in _FACTS.items()]
    # Of an adapter, what it has beside the parameters of its base.
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    count = sum(parameter.numel() for parameter in model.parameters()) - adapter
    rows.append(("parameters", f"{count:,}"))
    if model is not whole:
        rows.append(("parameters of the adapter", f"{adapter:,}"))
    rows.append(("number format", str(whole.dtype).removeprefix("torch.")))
    if hasattr(whole, "interval"):
        low, high = whole.interval()
        rows.append(("interval of noise levels in training", f"{low:.4g} to {high:.4g}"))
    return [(label, value) for label, value in rows if value is not None]


def _training(recipe: dict[str, Any], results: dict[str, Any], weights: dict[str, Any]) -> str:
    rows = [(label, recipe[name]) for name, label in _TRAINING.items() if recipe.get(name) is not None]
    start = recipe.get("init_from")
    if start is not None:
        rows.append(("started from", "a model of its own" if _is_local(str(start)) else start))
    if recipe.get("interval_search"):
        rows.append(("interval of noise levels", "learned: searched at each evaluation (paper, section 5.3)"))
    if weights.get("weights") == "average":
        rows.append(("weights", f"exponential moving average, decay {weights.get('ema_decay')}"))
    elif weights:
        rows.append(("weights", "as they were trained, not averaged"))
    for name, label in (("steps", "optimizer steps"), ("global_batch_size", "sequences of a step"), ("seed", "seed")):
        if results.get(name) is not None:
            rows.append((label, results[name]))
    versions = results.get("versions") or {}
    if versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return _table(rows) if rows else ""


def _data(dataset: str | None, hub_dataset: str | None) -> str:
    if dataset is None:
        return "Not recorded in the folder that this model was pushed from."
    if hub_dataset is not None:
        return f"`{dataset}`: [{hub_dataset}](https://huggingface.co/datasets/{hub_dataset})."
    if _is_local(dataset):
        return f"A file or folder of its trainer, `{Path(dataset).name}`, which is not published here."
    return f"`{dataset}`, the text that bd3lm_hf finds in every Python interpreter."


def _evaluation(results: dict[str, Any]) -> str:
    rows = []
    for name, label in (("before", "before training"), ("after", "after training")):
        score = results.get(name)
        if score:
            # A model without a likelihood has a loss in its place.
            nats = f"{score.get('nll', score.get('loss')):.4f} ± {score['standard_error']:.4f}"
            rows.append((label, _number(score.get("perplexity"), 2), nats, _number(score.get("bits_per_byte"), 4)))
    if not rows:
        return ""
    if results.get("unigram_perplexity") is not None:
        rows.append(("word frequencies alone", _number(results["unigram_perplexity"], 2), "", ""))
    scored = results["after" if results.get("after") else "before"]
    count = f"{scored['num_tokens']:,} tokens in {scored['num_sequences']:,} sequences of held-out text."
    return _table(rows, head=("", "perplexity", "nats per token ± s.e.", "bits per byte")) + f"\n\nOn {count}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _eval_results(
    recipe: dict[str, Any], results: dict[str, Any], dataset: str | None, hub_dataset: str | None
) -> list[EvalResult]:
    score = results.get("after") or {}
    if dataset is None:
        return []
    name = Path(dataset).name if _is_local(dataset) else dataset
    arguments = {"estimator": recipe.get("final_estimator") or recipe.get("eval_estimator") or "stratified"}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=hub_dataset or name,
            dataset_name=name,
            dataset_config=recipe.get("dataset_config"),
            dataset_split="validation",
            metric_type=metric,
            metric_name=label,
            metric_value=score[metric],
            metric_args=arguments,
        )
        for metric, label in _METRICS.items()
        if isinstance(score.get(metric), float) and math.isfinite(score[metric])
    ]


def _window(config: Any) -> str:
    length = getattr(config, "max_position_embeddings", None)
    return f"It was trained on sequences of {length:,} tokens." if length else "Its training length is not recorded."


def _table(rows: Sequence[tuple[Any, ...]], head: Sequence[str] | None = None) -> str:
    width = len(rows[0])
    lines = [tuple(head or ("",) * width), ("---",) * width, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


__all__ = ["TEMPLATE", "make_card"]
