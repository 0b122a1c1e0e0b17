"""A recipe made for one model type, run with another: which of its fields still have a meaning."""

from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.utils import logging


logger = logging.get_logger("bd3lm_hf.train")

DEFAULT_TYPE = "bd3lm"
# How the likelihood of blocks is searched and estimated, beside the fields of a model's configuration.
_OF_BLOCKS = ("interval_", "final_estimator", "eval_estimator")


def fit_to_type(recipe: dict[str, Any], argv: Sequence[str], *, model_fields: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe that go with the model type of the command line, if that is another than the recipe's.

    Left out, with a note, are fields of the network that the type does not have or does not share
    (`unshared_fields` of its configuration), and with them what concerns the likelihood of blocks. What the command
    line says itself is not touched.

    Args:
        argv: the command line behind the recipe.
        model_fields: names of the fields that describe the network.
    """
    wanted = _given_type(argv)
    if wanted is None or wanted == recipe.get("model_type", DEFAULT_TYPE) or wanted not in CONFIG_MAPPING:
        return recipe
    config_class: Any = CONFIG_MAPPING[wanted]
    unshared = getattr(config_class, "unshared_fields", ())
    own = ("model_type", "init_from", "attn_implementation")
    dropped = [
        name
        for name in recipe
        if name in unshared
        or (name in model_fields and name not in own and not hasattr(config_class, name))
        or ("block_size" in unshared and name.startswith(_OF_BLOCKS))
    ]
    if dropped:
        logger.warning(
            f"--model_type {wanted} leaves out what the recipe sets for another model type: {', '.join(dropped)}."
        )
    return {name: value for name, value in recipe.items() if name not in dropped}


def _given_type(argv: Sequence[str]) -> str | None:
    """The last `--model_type` of a command line."""
    found = None
    for number, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == "__model_type":
            found = value if equals else "".join(argv[number + 1 : number + 2])
    return found


__all__ = ["fit_to_type"]
