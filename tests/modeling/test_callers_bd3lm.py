"""Callers that take a block-diffusion model for a next-token predictor or a classifier."""

import logging

import pytest
import torch
from decoders import tiny_decoder
from generating import make_family
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from bd3lm_hf.modeling import callers_bd3lm


def model_of(family: str, tokenizer=None):
    """A model in float32, with the vocabulary of a tokenizer."""
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
    callers_bd3lm.logger.warning_once.__func__.cache_clear()
    with caplog.at_level(logging.WARNING, logger=callers_bd3lm.logger.name):
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


def test_denoising_caching_scoring_and_writing_do_not_warn(warnings_logged):
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
    # The masks of padding are nothing to denoise.
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
def test_pipelines_that_want_classes_are_refused(family, task, tiny_tokenizer):
    classify = pipeline(task, model=model_of(family, tiny_tokenizer), tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="has no classes.*text-generation"):
        classify("The quick fox", **({"candidate_labels": ["a", "b"]} if task.startswith("zero") else {}))


def test_the_perplexity_metric_of_evaluate_is_refused():
    file = "/cache/evaluate_modules/metrics/evaluate-metric--perplexity/0123/perplexity.py"
    metric: dict = {}
    exec(compile("def compute(model, ids): return model(ids).logits", file, "exec"), metric)
    ids = torch.arange(3, 11).unsqueeze(0)
    with pytest.raises(ValueError, match="bd3lm eval"):
        metric["compute"](model_of("bd3lm"), ids)
    assert metric["compute"](model_of("ar"), ids).isfinite().all()
