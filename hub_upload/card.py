"""The model card: architecture, training data and scores of a model, from the files of its run.

The metadata is huggingface_hub's `ModelCardData`, with the held-out perplexity as its model index. Text from files of
the run is escaped, since a card is shown on a web page.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bd3lm_hf.console import escape_markdown, markdown_table
from bd3lm_hf.data.sources import DEFAULT_DATASET, find_spec, is_local
from bd3lm_hf.run_folder import RECIPE_NAME, RESULTS_NAME, WEIGHTS_NAME
from bd3lm_hf.user_files import read_json, read_yaml


TEMPLATE = Path(__file__).parent / "model_card.md"
# Recipe fields that are published. Others may contain folders, host names and logins.
_TRAINING = {
    "max_steps": "requested optimizer steps",
    "num_train_epochs": "requested epochs",
    "optim": "optimizer",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "learning rate schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "maximum gradient norm",
    "bf16": "bfloat16",
    "fp16": "float16",
    "packing": "packing",
    "lora_r": "rank of the adapter",
    "lora_alpha": "alpha of the adapter",
}
_FACTS = {
    "model_type": "model type",
    "block_size": "block size",
    "model_length": "tokens per training sequence",
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
    """Return the card of a model.

    Args:
        source: folder of the model; its `recipe.yaml`, `results.json` and `weights.json` are read if they exist. For a
            checkpoint, the recipe of its run is read.
        repo_id: repository that the code examples load.
        tokenizer: whether the model has one.
        base: repository of an adapter's base model.
        decay: decay of the average that was loaded instead of the checkpoint's weights described in `weights.json`.
        license: in the Hub's spelling, such as "apache-2.0".

    Raises:
        ValueError: if a file of the run cannot be read.
    """
    run_recipe, results = _read_run(source)
    recipe = run_recipe or {}
    averaged = {"weights": "average", "ema_decay": decay}
    weights = _read_json(source / WEIGHTS_NAME) if decay is None else averaged
    dataset = None if run_recipe is None else str(recipe.get("dataset") or DEFAULT_DATASET)
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
        evaluation=_evaluation(recipe, results, dataset),
        length=whole.config.model_length,
    )


# Read the files of a run


def _read_run(source: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the recipe (None without a run) and results of a folder's run; a checkpoint has no results."""
    run = next((folder for folder in (source, source.parent) if (folder / RECIPE_NAME).is_file()), None)
    if run is None:
        return None, {}
    recipe = read_yaml(run / RECIPE_NAME)
    return recipe if isinstance(recipe, dict) else {}, _read_json(source / RESULTS_NAME) if run == source else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _hub_dataset(name: str) -> str | None:
    """Return the Hub repository of a dataset; None for local files and the text that comes with Python."""
    try:
        return None if is_local(name) else find_spec(name).path
    except ValueError:
        return None


# Sections


def _facts(model: Any, whole: Any) -> list[tuple[str, Any]]:
    config = whole.config
    rows = [(label, getattr(config, name, None)) for name, label in _FACTS.items()]
    # peft adds its matrices under these names; all other parameters are those of the base.
    own = re.compile(r"lora_|trainable_tokens_")
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if own.search(name))
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
        rows.append(("started from", "a local model" if is_local(str(start)) else start))
    if recipe.get("interval_search"):
        rows.append(("interval of noise levels", "learned: searched at each evaluation (paper, section 5.3)"))
    if weights.get("weights") == "average":
        rows.append(("weights", f"exponential moving average, decay {weights.get('ema_decay')}"))
    elif weights:
        rows.append(("weights", "last step of training, not averaged"))
    for name, label in (("steps", "optimizer steps"), ("global_batch_size", "sequences per step"), ("seed", "seed")):
        if results.get(name) is not None:
            rows.append((label, results[name]))
    if versions := results.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return _table(rows) if rows else ""


def _data(dataset: str | None, hub_dataset: str | None) -> str:
    if dataset is None:
        return "Not recorded in the folder that this model was pushed from."
    if hub_dataset is not None:
        return f"{escape_markdown(dataset)}: [{escape_markdown(hub_dataset)}](https://huggingface.co/datasets/{quote(hub_dataset)})."
    if is_local(dataset):
        return f"A local file or folder, {escape_markdown(Path(dataset).name)}, which is not published here."
    return f"`{dataset}`, text that comes with every Python installation."


def _evaluation(recipe: dict[str, Any], results: dict[str, Any], dataset: str | None) -> str:
    rows = []
    for name, label in (("before", "before training"), ("after", "after training")):
        if score := results.get(name):
            # A model without a likelihood has a loss instead.
            nats = f"{_number(score.get('nll', score.get('loss')), 4)} ± {_number(score.get('standard_error'), 4)}"
            rows.append((label, _number(score.get("perplexity"), 2), nats, _number(score.get("bits_per_byte"), 4)))
    if not rows:
        return ""
    if results.get("unigram_perplexity") is not None:
        rows.append(("unigram model", _number(results["unigram_perplexity"], 2), "", ""))
    scored = results.get("after") or results["before"]
    count = f"{_number(scored.get('num_tokens'), 0)} tokens in {_number(scored.get('num_sequences'), 0)} sequences"
    origin = "held-out text" if dataset is None else f"the held-out split of {escape_markdown(_short(dataset))}"
    text = f"On {count} of {origin}, with the estimator `{_estimator(recipe)}`."
    return _table(rows, head=("", "perplexity", "nats per token ± s.e.", "bits per byte")) + f"\n\n{text}"


def _estimator(recipe: dict[str, Any]) -> str:
    return escape_markdown(recipe.get("final_estimator") or recipe.get("eval_estimator") or "stratified")


def _short(dataset: str) -> str:
    return Path(dataset).name if is_local(dataset) else dataset


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _eval_results(
    recipe: dict[str, Any], results: dict[str, Any], dataset: str | None, hub_dataset: str | None
) -> list[EvalResult]:
    score = results.get("after") or {}
    if dataset is None:
        return []
    name = _short(dataset)
    arguments = {"estimator": _estimator(recipe)}
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
        if score.get(metric) is not None and math.isfinite(score[metric])
    ]


def _table(rows: Sequence[tuple[Any, ...]], head: Sequence[str] | None = None) -> str:
    return markdown_table(head or [""] * len(rows[0]), [[escape_markdown(cell) for cell in row] for row in rows])
