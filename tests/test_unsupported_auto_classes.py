"""An Auto class that does not fit a checkpoint says which one does, and hides no checkpoint from the loader."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from bd3lm_hf import ARConfig, ARForCausalLM
from bd3lm_hf.checkpoints import load_model


@pytest.fixture
def folder(tmp_path):
    config = ARConfig(vocab_size=12, model_length=8, hidden_dim=16, n_blocks=1, n_heads=2)
    ARForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("trust", [False, True])
def test_a_masked_language_model_is_not_made_of_an_autoregressive_one(folder, trust):
    message = "AutoModelForMaskedLM has no class for model_type='ar': load it with AutoModelForCausalLM, .*AR"
    with pytest.raises(ValueError, match=message):
        AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust)
    with pytest.raises(ValueError, match=message):
        AutoModelForMaskedLM.from_config(ARConfig())


def test_the_class_that_fits_loads_it(folder):
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is ARForCausalLM
    assert type(load_model(str(folder))) is ARForCausalLM
