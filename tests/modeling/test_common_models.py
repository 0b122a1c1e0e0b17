"""transformers' own common model tests, run on our models: saving, loading, casting, training, attention, embeddings.

They are not part of the installed library. `make test-slow` unpacks them from its source distribution and names the
folder in BD3LM_TRANSFORMERS_SOURCE.
"""

import importlib
import os
import sys
import types
import unittest
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import stock_fields
from transformers import initialization

from bd3lm_hf.modeling.backbone_bd3lm import BD3LMModel, BD3LMPreTrainedModel
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_bd3lm_decoders import BD3LMGPT2ForMaskedLM, BD3LMQwen3ForMaskedLM


pytestmark = pytest.mark.slow
PUBLISHED_INITIALISATION = BD3LMPreTrainedModel._init_weights

TESTS = Path(os.environ.get("BD3LM_TRANSFORMERS_SOURCE", "")) / "tests"
FOUND = "BD3LM_TRANSFORMERS_SOURCE" in os.environ and (TESTS / "test_modeling_common.py").is_file()


def load_common_tests() -> types.ModuleType:
    """Load transformers' `tests/test_modeling_common.py` in a package that cannot clash with another `tests`."""

    def module(name: str, **contents: object) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)

    module("transformers_tests", __path__=[str(TESTS)])
    # The distribution lacks the subfolders, of which two mixins are imported by name. These empty ones add no test.
    module("transformers_tests.exporters")
    module("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    module("transformers_tests.generation")
    module("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common")


def test_the_common_tests_of_transformers_are_available():
    assert FOUND, (
        "transformers' common model tests are missing: run `make test-slow`, which unpacks the source distribution of "
        f"the installed version (BD3LM_TRANSFORMERS_SOURCE={os.environ.get('BD3LM_TRANSFORMERS_SOURCE', '')!r})."
    )


class ModelTester:
    """The sizes, the configuration and the inputs that the common tests ask for."""

    batch_size, seq_length, is_training = 3, 8, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def get_config(self) -> BD3LMConfig:
        sizes = {"vocab_size": self.vocab_size, "hidden_dim": self.hidden_size, "n_blocks": self.num_hidden_layers}
        sizes |= {"n_heads": self.num_attention_heads, "cond_dim": 16, "block_size": 4, "model_length": 16}
        # Not the last id, the default: the tests drop the last ids, which we refuse if the mask is among them.
        return BD3LMConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2, mask_token_id=3)

    def prepare_config_and_inputs_for_common(self) -> tuple[BD3LMConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(4, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class DecoderTester(ModelTester):
    """The same, for block diffusion on a decoder of transformers."""

    def __init__(self, family: str, model_class: type) -> None:
        self.family, self.model_class = family, model_class

    def get_config(self) -> Any:
        fields = stock_fields(self.family) | {"vocab_size": self.vocab_size}
        return self.model_class.config_class(**fields, block_size=4, model_length=16, mask_token_id=3)


def initialise_informatively(model: BD3LMPreTrainedModel, module: torch.nn.Module) -> None:
    """Initialise as published, but draw at random what is published as zero: adaLN and the head.

    A new model gives the same output for every input, so no comparison of outputs could fail.
    """
    PUBLISHED_INITIALISATION(model, module)
    if isinstance(module, torch.nn.Linear) and not module.weight.any():
        initialization.normal_(module.weight, std=0.2)
        initialization.normal_(module.bias, std=0.2)


if FOUND:
    common = load_common_tests()
    # The tests look up by name which classes have no loss; ours is not in transformers' own table.
    common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "bd3lm": "BD3LMModel"}

    class OfBlockDiffusion(common.ModelTesterMixin):
        """The common tests, adapted to block diffusion."""

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            # The common version only gives labels to transformers' own masked language models, by class name.
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
            if not return_labels or model_class is BD3LMModel:
                return inputs
            # The noise is passed too: the tests expect two passes over the same inputs to give the same loss.
            batch, length = inputs["input_ids"].shape
            blocks = self.model_tester.get_config().num_blocks(length)
            generator = torch.Generator().manual_seed(0)
            shapes = {"block_noise": (batch, blocks), "token_noise": (batch, length), "count_noise": (batch, blocks)}
            noise = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
            return inputs | noise | {"labels": inputs["input_ids"].clone()}

        @unittest.skip("GenerationTesterMixin, which it asks for, is not in the source distribution")
        def test_generation_tester_mixin_inheritance(self):
            pass

    class TestBD3LM(OfBlockDiffusion, unittest.TestCase):
        all_model_classes = (BD3LMModel, BD3LMForMaskedLM)
        # Requires that `_init_weights` reaches every weight, which the tests demand only of recent models.
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = ModelTester()
            patch = unittest.mock.patch.object(BD3LMPreTrainedModel, "_init_weights", initialise_informatively)
            patch.start()
            self.addCleanup(patch.stop)

    class TestBD3LMQwen3(OfBlockDiffusion, unittest.TestCase):
        all_model_classes = (BD3LMQwen3ForMaskedLM,)

        def setUp(self) -> None:
            self.model_tester = DecoderTester("qwen3", BD3LMQwen3ForMaskedLM)

    class TestBD3LMGPT2(OfBlockDiffusion, unittest.TestCase):
        all_model_classes = (BD3LMGPT2ForMaskedLM,)

        def setUp(self) -> None:
            self.model_tester = DecoderTester("gpt2", BD3LMGPT2ForMaskedLM)
