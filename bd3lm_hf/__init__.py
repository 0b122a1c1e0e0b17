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

# The public names of each module, which is imported when one of them is first used.
_NAMES = {
    "adapt": ("adapt_decoder",),
    "modeling.backbone_bd3lm": ("BD3LMModel",),
    "modeling.configuration_bd3lm": ("ARConfig", "BD3LMConfig", "MDLMConfig", "SEDDConfig"),
    "modeling.configuration_ssdlm": ("SSDLMConfig",),
    "modeling.decoding_state_bd3lm": ("EntropyStopCriteria", "SecondEosCriteria"),
    "modeling.generation_config_bd3lm": ("BD3LMGenerationConfig", "SEDDGenerationConfig"),
    "modeling.generation_ssdlm": ("SSDLMGenerationConfig",),
    "modeling.likelihood_bd3lm": ("TokenNLL",),
    "modeling.modeling_ar": ("ARForCausalLM",),
    "modeling.modeling_bd3lm": ("BD3LMForMaskedLM",),
    "modeling.modeling_mdlm": ("MDLMForMaskedLM",),
    "modeling.modeling_sedd": ("SEDDForMaskedLM",),
    "modeling.modeling_ssdlm": ("SSDLMForMaskedLM",),
    "modeling.noise_bd3lm": ("noise_schedule",),
}
_MODULES = {name: f"bd3lm_hf.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
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
