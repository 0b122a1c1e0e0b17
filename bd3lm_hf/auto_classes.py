"""Register our model types with transformers' Auto classes and with peft, once these are imported."""

import importlib
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


# Only the standard library is imported at the top: registration can run during the first import of any of our modules,
# and importing bd3lm_hf alone must not take seconds.


class _AfterImport(MetaPathFinder):
    """Let the other finders find a library, and call the action once its loader has executed it."""

    def __init__(self, library: str, action: Callable[[], None]) -> None:
        self.library, self.action = library, action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the library, whose loader calls the action; None for every other module."""
        if name != self.library:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        loader.exec_module = exec_module


def after_import(library: str, action: Callable[[], None]) -> None:
    """Call `action` once, as soon as the top-level module `library` is imported; at once if it is already.

    Importing a submodule imports the library first, so the action never sees a half-imported library.
    """
    if library in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(library, action))


def model_classes() -> tuple[Any, ...]:
    """Return the main class of every model type."""
    from bd3lm_hf.modeling.modeling_ar import ARForCausalLM
    from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
    from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS
    from bd3lm_hf.modeling.modeling_mdlm import MDLMForMaskedLM
    from bd3lm_hf.modeling.modeling_sedd import SEDDForMaskedLM
    from bd3lm_hf.modeling.modeling_ssdlm import SSDLMForMaskedLM

    return (BD3LMForMaskedLM, ARForCausalLM, MDLMForMaskedLM, SEDDForMaskedLM, SSDLMForMaskedLM, *DECODERS.values())


def _push_saved_folder(folder: Any, repo_id: str, **options: Any) -> Any:
    # For `model.push_to_hub`. `hub_upload` imports this package, so it is imported by name, and only for a push.
    push = importlib.import_module("bd3lm_hf.hub_upload.push")
    return push.push_saved_folder(folder, repo_id, **options)


def _share_saved_weights(folder: Any) -> None:
    # safetensors creates private files (0600), so colleagues could not read the weights in a shared folder.
    config = Path(folder, "config.json")
    for weights in Path(folder).glob("model*.safetensors") if config.is_file() else ():
        shutil.copymode(config, weights)


def register_auto_classes() -> None:
    """Register every model type; each model class lists the Auto classes that support it."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from bd3lm_hf.foreign_layouts import adopt_published_decoding, contract_config_classes
    from bd3lm_hf.modeling.compatibility_bd3lm import SelfContainedMixin
    from bd3lm_hf.modeling.modeling_bd3lm_decoders import BD3LMDecoderMixin

    SelfContainedMixin.push_saved_folder = staticmethod(_push_saved_folder)
    SelfContainedMixin.share_saved_weights = staticmethod(_share_saved_weights)
    BD3LMDecoderMixin.adopt_published_decoding = adopt_published_decoding
    for model_type, config_class in contract_config_classes().items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
    auto_classes: tuple[Any, ...] = (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)
    for model_class in model_classes():
        config_class = model_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in auto_classes:
            if (found := model_class.auto_classes.get(auto_class.__name__)) is not None:
                auto_class.register(config_class, found, exist_ok=True)


def register_lora_targets() -> None:
    """Let `LoraConfig` without `target_modules` adapt attention and MLP of our models."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets_by_type

    for model_class in model_classes():
        targets_by_type.setdefault(model_class.config_class.model_type, list(model_class.lora_targets))
