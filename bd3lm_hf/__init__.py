"""Block diffusion language models (BD3-LM, arXiv 2503.09573) for the Hugging Face stack.

Importing this package registers its model types with transformers' Auto classes.
"""

import configparser
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3lm_hf.auto_classes import after_import, register_auto_classes, register_lora_targets


__version__ = "0.1.0"


def _is_our_checkout(folder: Path) -> bool:
    parser = configparser.ConfigParser()
    try:
        parser.read(folder / "setup.cfg", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return False
    return parser.get("metadata", "name", fallback=None) == "bd3lm-hf"


# In a bare checkout, some subpackages (modeling, training, ...) are next to this folder, not inside it. A setup.cfg of
# another project there means that this folder was copied into that project.
_PARENT = Path(__file__).resolve().parent.parent
if _is_our_checkout(_PARENT):
    __path__.append(str(_PARENT))


# The `bd3lm` command reports wrong arguments before it imports anything slow, so this package must not import
# transformers. The model types are registered when something else does, or at once if it has been imported already.
after_import("transformers", register_auto_classes)
after_import("peft", register_lora_targets)


if TYPE_CHECKING:
    from bd3lm_hf.adapt import adapt_decoder
    from bd3lm_hf.modeling.backbone_bd3lm import BD3LMModel
    from bd3lm_hf.modeling.configuration_bd3lm import ARConfig, BD3LMConfig, MDLMConfig, SEDDConfig
    from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig
    from bd3lm_hf.modeling.decoding_state_bd3lm import EntropyStopCriteria, SecondEosCriteria
    from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig, SEDDGenerationConfig
    from bd3lm_hf.modeling.generation_ssdlm import SSDLMGenerationConfig
    from bd3lm_hf.modeling.likelihood_bd3lm import TokenNLL
    from bd3lm_hf.modeling.modeling_ar import ARForCausalLM
    from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
    from bd3lm_hf.modeling.modeling_mdlm import MDLMForMaskedLM
    from bd3lm_hf.modeling.modeling_sedd import SEDDForMaskedLM
    from bd3lm_hf.modeling.modeling_ssdlm import SSDLMForMaskedLM
    from bd3lm_hf.modeling.noise_bd3lm import noise_schedule

# The module of each public name, imported when the name is first used.
_MODULES = {
    "adapt_decoder": "bd3lm_hf.adapt",
    "ARConfig": "configuration_bd3lm",
    "ARForCausalLM": "modeling_ar",
    "BD3LMConfig": "configuration_bd3lm",
    "BD3LMForMaskedLM": "modeling_bd3lm",
    "BD3LMGenerationConfig": "generation_config_bd3lm",
    "BD3LMModel": "backbone_bd3lm",
    "EntropyStopCriteria": "decoding_state_bd3lm",
    "MDLMConfig": "configuration_bd3lm",
    "MDLMForMaskedLM": "modeling_mdlm",
    "SEDDConfig": "configuration_bd3lm",
    "SEDDForMaskedLM": "modeling_sedd",
    "SEDDGenerationConfig": "generation_config_bd3lm",
    "SSDLMConfig": "configuration_ssdlm",
    "SSDLMForMaskedLM": "modeling_ssdlm",
    "SSDLMGenerationConfig": "generation_ssdlm",
    "SecondEosCriteria": "decoding_state_bd3lm",
    "TokenNLL": "likelihood_bd3lm",
    "noise_schedule": "noise_bd3lm",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    value = getattr(importlib.import_module(module if "." in module else f"bd3lm_hf.modeling.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "ARConfig",
    "ARForCausalLM",
    "BD3LMConfig",
    "BD3LMForMaskedLM",
    "BD3LMGenerationConfig",
    "BD3LMModel",
    "EntropyStopCriteria",
    "MDLMConfig",
    "MDLMForMaskedLM",
    "SEDDConfig",
    "SEDDForMaskedLM",
    "SEDDGenerationConfig",
    "SSDLMConfig",
    "SSDLMForMaskedLM",
    "SSDLMGenerationConfig",
    "SecondEosCriteria",
    "TokenNLL",
    "adapt_decoder",
    "noise_schedule",
]
