"""What an Auto class says of a checkpoint whose model is of another kind: which Auto class loads it."""

from typing import Any, NoReturn


class UnsupportedAutoClass:
    """Stands where an Auto class looks for a model class; asked for a model, it names the one that has it."""

    config_class: Any
    message: str

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """There is nothing to load.

        Raises:
            ValueError: always; the message names the right classes.
        """
        raise ValueError(cls.message)

    _from_config = from_pretrained


def unsupported_auto_class(head: Any, auto_class: str) -> type[UnsupportedAutoClass]:
    """The class that has `auto_class` refuse checkpoints of the model class `head`."""
    message = (
        f"{auto_class} has no class for model_type={head.config_class.model_type!r}: load it with "
        f"AutoModelForCausalLM, which gives a {head.__name__}."
    )
    return type(f"No{head.__name__}", (UnsupportedAutoClass,), {"config_class": head.config_class, "message": message})


def is_unsupported_auto_class(found: Any) -> bool:
    """Whether what an Auto class found is no model."""
    return isinstance(found, type) and issubclass(found, UnsupportedAutoClass)


__all__ = ["UnsupportedAutoClass", "is_unsupported_auto_class", "unsupported_auto_class"]
