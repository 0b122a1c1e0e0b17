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
    PreTrainedConfig,
    PreTrainedModel,
)

from bd3lm_hf.adapters import register_targets
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.likelihood_bd3lm import TokenNLL
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel
from bd3lm_hf.modeling.noise_bd3lm import noise_schedule
from bd3lm_hf.modeling.stopping_bd3lm import EntropyStopCriteria, SecondEosCriteria


# One line per model type: its configuration and what each Auto class makes of it.
_MODELS: tuple[tuple[type[PreTrainedConfig], dict[Any, type[PreTrainedModel]]], ...] = (
    (
        BD3LMConfig,
        {AutoModel: BD3LMModel, AutoModelForMaskedLM: BD3LMForMaskedLM, AutoModelForCausalLM: BD3LMForMaskedLM},
    ),
)

for _config, _classes in _MODELS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    register_targets(_config.model_type)
    for _auto_class, _model in _classes.items():
        _auto_class.register(_config, _model, exist_ok=True)

__all__ = [
    "BD3LMConfig",
    "BD3LMForMaskedLM",
    "BD3LMGenerationConfig",
    "BD3LMModel",
    "EntropyStopCriteria",
    "SecondEosCriteria",
    "TokenNLL",
    "noise_schedule",
]
