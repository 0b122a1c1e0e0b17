"""The versions of transformers that can run a folder, and the callers that a model refuses."""

import configparser
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoders import tiny_decoder
from generating import make_family
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import Trainer, TrainingArguments, pipeline
from transformers.utils import logging as transformers_logging

import bd3lm_hf
from bd3lm_hf.modeling import compatibility_bd3lm
from bd3lm_hf.modeling.compatibility_bd3lm import TRANSFORMERS_VERSIONS


def test_the_package_requires_the_same_versions():
    setup = configparser.ConfigParser()
    setup.read(Path(bd3lm_hf.__file__).parent.parent / "setup.cfg", encoding="utf-8")
    requirements = map(Requirement, setup["options"]["install_requires"].split("\n")[1:])
    assert {r.specifier for r in requirements if r.name == "transformers"} == {SpecifierSet(TRANSFORMERS_VERSIONS)}


def test_a_saved_folder_states_the_versions(model_folder):
    assert json.loads((model_folder / "config.json").read_text())["requires_transformers"] == TRANSFORMERS_VERSIONS


# Pretend that another version of transformers is installed, one without a class that the code imports.
ELSEWHERE = """
import importlib.metadata
import sys
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

found = importlib.metadata.version
importlib.metadata.version = lambda name: sys.argv[2] if name == "transformers" else found(name)
# The import of `pipeline` creates this module a second time.
del sys.modules["transformers.configuration_utils"].PreTrainedConfig
for load in (
    AutoConfig.from_pretrained,
    AutoModelForCausalLM.from_pretrained,
    lambda folder, **options: pipeline("text-generation", model=folder, **options),
):
    try:
        load(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("version", ["5.11.9", "6.0.0"])
def test_every_way_to_load_reports_the_version_before_anything_else_fails(model_folder, tmp_path, version):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", ELSEWHERE, str(model_folder), version]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    start, end = f"transformers{TRANSFORMERS_VERSIONS} is required", f"found transformers=={version}."
    assert len(lines) == 3 and all(line.startswith(start) and line.endswith(end) for line in lines), lines


@pytest.mark.parametrize("name", ["configuration_bd3lm", "configuration_ssdlm"])
def test_the_check_is_the_first_thing_that_a_configuration_imports(name):
    source = (Path(compatibility_bd3lm.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports[0].startswith("from .compatibility_bd3lm import ")


def model_of(family: str, tokenizer=None):
    """Return a model in float32, with the vocabulary of a tokenizer."""
    fields = {} if tokenizer is None else {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    if family == "llama":
        return tiny_decoder("llama", **fields)
    return make_family(family, model_length=32, **fields).float()


def harness_of(model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")


def request(kind: str, *arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))]


@pytest.fixture
def warnings_logged(caplog):
    transformers_logging.get_logger("transformers")  # sets up the library's root logger
    compatibility_bd3lm.logger.warning_once.__func__.cache_clear()
    with caplog.at_level(logging.WARNING, logger=compatibility_bd3lm.logger.name):
        yield lambda: [record.getMessage() for record in caplog.records if "next-token" in record.getMessage()]


@pytest.mark.parametrize("family", ["bd3lm", "mdlm", "sedd"])
def test_logits_of_a_text_without_masks_warn_once(family, warnings_logged):
    model, ids = model_of(family), torch.arange(3, 11).unsqueeze(0)
    options = {"timesteps": torch.tensor([0.5])} if family == "sedd" else {}
    for _ in range(2):
        model(ids, **options)
        model.backbone(ids, **options)
    (message,) = warnings_logged()
    assert "token_nll" in message and "generate" in message


class ShiftingTrainer(Trainer):
    """Remove the labels from the batch, and compute a next-token loss from the logits."""

    def compute_loss(self, model, inputs, **kwargs):
        logits, labels = model(inputs["input_ids"]).logits[:, :-1], inputs.pop("labels")[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("family", ["bd3lm", "mdlm", "llama", "ar"])
def test_a_trainer_that_shifts_the_logits_itself_is_refused(family, tmp_path):
    texts = torch.randint(3, 46, (4, 8)).tolist()
    for masks in (0, 1):
        first = [model_of(family).config.mask_token_id] * masks
        rows = [{"input_ids": first + ids, "labels": [3] * masks + ids} for ids in texts]
        arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
        train = ShiftingTrainer(model_of(family), arguments, train_dataset=rows).train
        if masks or family == "ar":  # with masks it may be a custom denoising loss
            train()
        else:
            with pytest.raises(ValueError, match="next-token loss"):
                train()


def test_denoising_caching_scoring_and_generating_do_not_warn(warnings_logged):
    model, ids = model_of("bd3lm"), torch.arange(3, 11).unsqueeze(0)
    masked = ids.index_fill(1, torch.tensor([5]), 47)
    model(masked)
    model(ids, clean_input_ids=ids)
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :4], past_key_values=cache, use_cache=False)
    model(ids, labels=ids)
    model.token_nll(ids)
    model.generate(ids, max_new_tokens=4)
    model.infill(masked)
    model_of("ar")(ids)
    assert not warnings_logged()
    # Mask tokens that are padding are not to be denoised.
    model(masked, torch.ones_like(ids).index_fill(1, torch.tensor([5]), 0))
    assert warnings_logged()


@pytest.mark.parametrize("family", ["bd3lm", "mdlm", "sedd", "llama"])
def test_the_hf_model_of_lm_eval_generates_but_does_not_score(family, tiny_tokenizer):
    harness = harness_of(model_of(family, tiny_tokenizer), tiny_tokenizer)
    for requests in (request("loglikelihood", "The quick", " fox"), request("loglikelihood_rolling", "The quick fox")):
        with pytest.raises(ValueError, match="bd3lm harness"):
            getattr(harness, requests[0].request_type)(requests, disable_tqdm=True)
    (text,) = harness.generate_until(request("generate_until", "The", {"until": ["#"], "max_gen_toks": 4}), True)
    assert text


def test_the_hf_model_of_lm_eval_scores_an_autoregressive_model(tiny_tokenizer):
    model = model_of("ar", tiny_tokenizer)
    harness = harness_of(model, tiny_tokenizer)
    ((score, _),) = harness.loglikelihood(request("loglikelihood", "The quick", " fox"), disable_tqdm=True)
    ids = tiny_tokenizer("The quick fox", return_tensors="pt", add_special_tokens=False).input_ids
    context = len(tiny_tokenizer("The quick", add_special_tokens=False).input_ids)
    nll = model.token_nll(ids, labels=ids.index_fill(1, torch.arange(context), -100)).nll.sum()
    assert score == pytest.approx(-float(nll), abs=0.05)  # which gives the mask no probability


@pytest.mark.parametrize("family", ["bd3lm", "ar", "llama"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "zero-shot-classification"])
def test_pipelines_that_expect_classes_are_refused(family, task, tiny_tokenizer):
    classify = pipeline(task, model=model_of(family, tiny_tokenizer), tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="has no classes.*text-generation"):
        classify("The quick fox", **({"candidate_labels": ["a", "b"]} if task.startswith("zero") else {}))


def test_fill_mask_does_not_mistake_padding_for_blanks(tiny_tokenizer):
    fill = pipeline("fill-mask", model=model_of("bd3lm", tiny_tokenizer), tokenizer=tiny_tokenizer)
    texts = ["The <mask> fox", "The quick brown <mask> jumps over"]
    alone = [fill(text, top_k=1)[0]["token"] for text in texts]
    assert [found[0]["token"] for found in fill(texts, top_k=1, batch_size=2)] == alone
    tiny_tokenizer.pad_token = tiny_tokenizer.mask_token
    assert [fill(text, top_k=1)[0]["token"] for text in texts] == alone
    with pytest.raises(ValueError, match="tokenizer.pad_token"):
        fill(texts, batch_size=2)


def test_the_perplexity_metric_of_evaluate_is_refused():
    file = "/cache/evaluate_modules/metrics/evaluate-metric--perplexity/0123/perplexity.py"
    metric: dict = {}
    exec(compile("def compute(model, ids): return model(ids).logits", file, "exec"), metric)
    ids = torch.arange(3, 11).unsqueeze(0)
    with pytest.raises(ValueError, match="bd3lm eval"):
        metric["compute"](model_of("bd3lm"), ids)
    assert metric["compute"](model_of("ar"), ids).isfinite().all()
