"""Block diffusion language models (BD3-LM, arXiv 2503.09573) for the Hugging Face stack.

Importing this package makes its model types known to the Auto classes of transformers.
"""

from pathlib import Path
from typing import Any


__version__ = "0.1.0"

# A bare checkout keeps the rooms beside this folder, not inside it; installed copies carry no setup.cfg.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").is_file():
    __path__.append(str(_CHECKOUT))

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)

from bd3lm_hf.auto_classes import unsupported_auto_class
from bd3lm_hf.checkpoints import TARGET_MODULES, register_targets
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
from bd3lm_hf.modeling.saving_bd3lm import SelfContainedModel
from bd3lm_hf.sharing import share_folder


_AUTO_CLASSES: dict[str, Any] = {
    auto_class.__name__: auto_class for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)
}

SelfContainedModel.share_folder = staticmethod(share_folder)

# A class says itself what each Auto class makes of its model type.
for _head in (BD3LMForMaskedLM, ARForCausalLM, MDLMForMaskedLM, SEDDForMaskedLM, SSDLMForMaskedLM):
    _config = _head.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    register_targets(_config.model_type, getattr(_head, "lora_targets", TARGET_MODULES))
    for _name, _auto_class in _AUTO_CLASSES.items():
        if _name in _head.auto_classes:
            _auto_class.register(_config, _head.auto_classes[_name], exist_ok=True)
        elif _auto_class is AutoModelForMaskedLM:
            _auto_class.register(_config, unsupported_auto_class(_head, _name), exist_ok=True)

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
    "noise_schedule",
]
