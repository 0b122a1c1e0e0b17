"""Hashes of what decides a number: they change with it, and with nothing else."""

import torch
from datasets import Dataset

from bd3lm_hf.evaluation.results import (
    config_identity,
    data_identity,
    digest,
    library_versions,
    tokenizer_identity,
    weights_digest,
)
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


def rows(count: int = 5, change: int | None = None) -> Dataset:
    ids = [[number, 7, 8] for number in range(count)]
    if change is not None:
        ids[change][1] = 9
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def test_a_saved_and_loaded_model_has_the_same_configuration(tiny_model, tmp_path):
    before = config_identity(tiny_model.config)
    tiny_model.save_pretrained(tmp_path)
    assert config_identity(tiny_model.config) == before
    assert config_identity(BD3LMForMaskedLM.from_pretrained(tmp_path).config) == before


def test_the_weights_have_one_digest_wherever_they_are_kept(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert weights_digest(BD3LMForMaskedLM.from_pretrained(tmp_path)) == weights_digest(tiny_model)


def test_a_changed_weight_type_or_name_changes_the_digest(tiny_model):
    found = {weights_digest(tiny_model), weights_digest(torch.nn.Linear(2, 2, bias=False).to(torch.bfloat16))}
    with torch.no_grad():
        next(tiny_model.parameters()).view(-1)[3] += 1e-3
    found.add(weights_digest(tiny_model))
    found.add(weights_digest(tiny_model.to(torch.bfloat16)))
    assert len(found) == 4


def test_a_configuration_is_what_the_model_computes(tiny_config):
    before = digest(config_identity(tiny_config))
    tiny_config._name_or_path, tiny_config.architectures = "elsewhere", ["X"]
    assert digest(config_identity(tiny_config)) == before
    tiny_config.block_size = 8
    assert digest(config_identity(tiny_config)) != before


def test_every_sequence_counts_unless_a_sample_is_asked_for():
    assert data_identity(rows()) == data_identity(rows())
    assert data_identity(rows(change=3)) != data_identity(rows())
    assert data_identity(rows(6), sample=3) == data_identity(rows(6, change=3), sample=3)
    assert data_identity(rows(6), sample=3) != data_identity(rows(6, change=2), sample=3)


def test_a_stream_says_itself_what_it_is():
    assert data_identity(iter([])) == {"kind": "a stream"}


def test_a_tokenizer_is_its_vocabulary(tiny_tokenizer):
    before = tokenizer_identity(tiny_tokenizer)
    assert before["tokens"] == len(tiny_tokenizer)
    tiny_tokenizer.add_tokens(["<new>"])
    assert tokenizer_identity(tiny_tokenizer) != before
    assert tokenizer_identity(None) == {}


def test_the_versions_are_those_that_are_loaded():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"bd3lm_hf", "torch", "transformers", "datasets", "python"}
