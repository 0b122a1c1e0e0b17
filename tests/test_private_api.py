"""The private names of libraries that the source uses: each exists, with the expected signature, and has a purpose.

A new version of a library may change them without notice. A failure here names the feature that breaks.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import accelerate
import accelerate.hooks
import datasets
import pytest
import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.cache_utils import Cache


ROOT = Path(__file__).resolve().parent.parent
LIBRARY_CLASSES = (GenerationMixin, PreTrainedModel, PreTrainedConfig, Trainer, Cache, torch.nn.Module)

# (owner, name, its parameters, the feature that depends on it)
METHODS = [
    (GenerationMixin, "_sample", ["logits_processor", "stopping_criteria", "generation_config"], "generate"),
    (GenerationMixin, "_prepare_generation_config", ["generation_config"], "our defaults in generate"),
    (GenerationMixin, "_prepare_attention_mask_for_generation", ["inputs_tensor"], "padding that is the mask token"),
    (GenerationMixin, "_prepare_special_tokens", ["generation_config"], "infill"),
    (GenerationMixin, "_prepare_cache_for_generation", ["generation_config", "model_kwargs"], "our caches"),
    (GenerationMixin, "_validate_model_kwargs", ["model_kwargs"], "generator and other arguments of generate"),
    (GenerationMixin, "_get_logits_processor", ["generation_config"], "the nucleus of the paper"),
    (GenerationMixin, "_get_stopping_criteria", ["generation_config"], "the stop at low entropy"),
    (PreTrainedModel, "_upload_modified_files", ["working_dir", "repo_id"], "push_to_hub with a model card"),
    (PreTrainedModel, "_init_weights", ["module"], "initial weights"),
    (PreTrainedModel, "_check_and_adjust_attn_implementation", ["attn_implementation"], "attention of decoders"),
    (Trainer, "_prepare_inputs", ["inputs"], "noise in float32 under DeepSpeed"),
    (Trainer, "_get_grad_norm", ["model", "grad_norm"], "the stop before weights that are not finite; signals"),
    (Trainer, "_run_epoch", ["self"], "a run that is resumed at its end takes no further step"),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"], "checkpoints with NaN are refused"),
    (Trainer, "_get_output_dir", ["trial"], "checkpoints that are complete or absent"),
    (Trainer, "_save_checkpoint", ["model", "trial"], "checkpoints that are complete or absent"),
    (Trainer, "_push_from_checkpoint", ["checkpoint_folder"], "uploads without pickles during training"),
    (Trainer, "_finish_current_push", ["self"], "uploads without pickles at the end of training"),
    (Trainer, "_load_optimizer_and_scheduler", ["checkpoint"], "averages of a resumed run"),
    (Trainer, "_load_best_model", ["self"], "averages of the best checkpoint"),
    (Trainer, "_save", ["output_dir"], "saving sharded weights"),
    (torch.nn.Module, "_apply", ["fn", "recurse"], "the interval of noise levels keeps its digits in a cast"),
]

HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
# (owner, name, the feature that depends on it)
ATTRIBUTES = [
    (torch, "_foreach_lerp_", "updates of averages"),
    *((torch.nn.Linear(1, 1), f"_{name}_hooks", "a layer with hooks is called, not read") for name in HOOKS),
    (torch.nn.Linear(1, 1), "_buffers", "the interval of noise levels"),
    (torch.nn.Linear(1, 1), "_parameters", "sharded weights"),
    (torch.ones(1), "_version", "prepacked weights notice a change"),
    (PreTrainedConfig(), "_attn_implementation", "the attention kernel"),
    (PreTrainedConfig(), "_name_or_path", "which model a result belongs to"),
    (GenerationConfig(), "_from_model_config", "saved defaults of generate; requests that share a round"),
    (datasets.Dataset.from_dict({"a": [1]}), "_fingerprint", "caches of packed text"),
    (datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset(), "_resolve_features", "columns of a stream"),
    (accelerate.optimizer.AcceleratedOptimizer, "step_was_skipped", "averages skip the steps that float16 skips"),
    (transformers.utils.hub, "PushInProgress", "uploads in the background"),
    (transformers.integrations.integration_utils, "get_available_reporting_integrations", "the check of --report_to"),
]


@pytest.mark.parametrize(("owner", "name", "parameters", "feature"), METHODS, ids=[entry[1] for entry in METHODS])
def test_a_private_method_has_the_expected_signature(owner, name, parameters, feature):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone: {feature}"
    found = inspect.signature(method).parameters
    has_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in found.values())
    assert has_any or set(parameters) <= set(found), f"{owner.__name__}.{name} takes {[*found]}: {feature}"


@pytest.mark.parametrize(("owner", "name", "feature"), ATTRIBUTES, ids=[entry[1] for entry in ATTRIBUTES])
def test_a_private_attribute_exists(owner, name, feature):
    assert hasattr(owner, name), f"{name} is gone: {feature}"


def test_the_loss_of_our_models_is_not_shifted_by_the_trainer():
    # `loss_type` is public, but nothing says that None keeps the Trainer from counting shifted labels.
    source = inspect.getsource(transformers.trainer)
    assert "_loss_shifts_labels" in source or "loss_type" in source


def test_lm_eval_calls_what_the_harness_overrides():
    model = pytest.importorskip("lm_eval.api.model")
    for name in ("_loglikelihood_tokens", "_encode_pair"):
        assert hasattr(model.TemplateLM, name)


# (module, name that its source must hold, the feature that depends on it)
IN_THE_SOURCE = [
    (transformers.trainer, "_train_batch_size", "batches of a stream"),
    (accelerate.hooks, "_hf_hook", "the device of offloaded weights"),
]


@pytest.mark.parametrize(("module", "name", "feature"), IN_THE_SOURCE, ids=[entry[1] for entry in IN_THE_SOURCE])
def test_a_private_attribute_of_an_instance_is_still_used(module, name, feature):
    assert name in inspect.getsource(module), f"{name} is gone: {feature}"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a CPU with oneDNN")
@pytest.mark.parametrize("name", ["_linear_pointwise", "_reorder_linear_weight"])
def test_the_operations_of_prepacked_weights_exist(name):
    assert hasattr(torch.ops.mkldnn, name), f"{name} is gone: prepacked weights of generation on a CPU"


UNRELATED = {"_prefill"}  # ours by the same name, in classes that are not the library's


def nodes() -> Iterator[ast.AST]:
    """Every node of the source of the rooms."""
    for room in ("bd3lm_hf", "modeling", "hub_upload", "training"):
        for path in (ROOT / room).rglob("*.py"):
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def private(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def private_names() -> set[str]:
    """Private methods that the rooms define or call on `super()`, if a class of a library has them too."""
    names = set()
    for node in nodes():
        if isinstance(node, ast.ClassDef):
            names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()":
            names.add(node.attr)
    return {name for name in private(names) - UNRELATED if any(hasattr(owner, name) for owner in LIBRARY_CLASSES)}


def test_every_private_method_of_a_library_is_listed():
    assert private_names() <= {name for _, name, _, _ in METHODS}


DOCUMENTED = {"_asdict", "_fields", "_replace"}  # of named tuples
# In tests above, and `_StreamError` in those of the server, which need its extra.
NAMED_ELSEWHERE = {"_linear_pointwise", "_reorder_linear_weight", "_StreamError", "_encode_pair", "_utils"}


def foreign_attributes() -> set[str]:
    """Private names that the rooms read, as an attribute or by an import, and define nowhere."""
    read, defined = set(), set()
    for node in nodes():
        if isinstance(node, ast.Attribute):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            read |= {alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    return private(read - defined)


def test_every_private_attribute_of_a_library_is_listed():
    listed = {entry[1] for entries in (METHODS, ATTRIBUTES, IN_THE_SOURCE) for entry in entries}
    assert foreign_attributes() - DOCUMENTED - NAMED_ELSEWHERE <= listed
