"""What an import costs, by what it leaves in `sys.modules`."""

import subprocess
import sys

import pytest


HEAVY = ("torch", "transformers", "datasets", "evaluate", "peft", "accelerate", "pyarrow")


def imported(code: str) -> list[str]:
    """Run code in a process of its own and return which of the heavy libraries it imported."""
    code = f"import sys\n{code}\nprint('imported:', *[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_importing_the_package_imports_nothing_heavy():
    assert imported("import bd3lm_hf") == []


@pytest.mark.parametrize(
    "first",
    [
        "import bd3lm_hf",
        "from bd3lm_hf.modeling.modeling_bd3lm import *",
        "import bd3lm_hf, transformers.modeling_layers",
    ],
)
def test_the_auto_classes_know_the_models_whichever_module_is_imported_first(first):
    load = "from transformers import AutoModelForMaskedLM, CONFIG_MAPPING"
    build = "config = CONFIG_MAPPING['bd3lm'](vocab_size=8, model_length=8, hidden_dim=8, n_blocks=1, n_heads=1)"
    check = "assert type(AutoModelForMaskedLM.from_config(config)).__module__ == 'bd3lm_hf.modeling.modeling_bd3lm'"
    libraries = imported("\n".join([first, load, build, check]))
    assert not {"datasets", "evaluate", "peft", "pyarrow"} & set(libraries)


def test_a_missing_public_name_is_an_attribute_error():
    import bd3lm_hf

    with pytest.raises(AttributeError, match="'NoSuchModel'"):
        bd3lm_hf.NoSuchModel  # noqa: B018
    assert "BD3LMForMaskedLM" in dir(bd3lm_hf)
