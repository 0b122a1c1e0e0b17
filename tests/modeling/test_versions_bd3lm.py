"""A folder states which versions of transformers can run its code, and under any other loading says so in one line."""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import bd3lm_hf
from bd3lm_hf.modeling import versions_bd3lm
from bd3lm_hf.modeling.versions_bd3lm import TRANSFORMERS_VERSIONS, check_transformers


LINE = "the code of this model needs transformers >=5.12,<6, but {} is installed here: run `pip install"


@pytest.mark.parametrize("version", ["5.12", "5.12.0", "5.12.0.dev0", "5.23.0", "5.100.1rc1"])
def test_the_versions_of_the_range_are_taken(version):
    check_transformers(version)
    assert SpecifierSet(TRANSFORMERS_VERSIONS).contains(version, prereleases=True) or "dev" in version


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.11.9", "5.2", "6.0.0", "6.0.0.dev0", "10.1", "unknown"])
def test_other_versions_are_refused_in_one_line(version):
    with pytest.raises(ImportError) as caught:
        check_transformers(version)
    assert str(caught.value).startswith(LINE.format(version)) and "\n" not in str(caught.value)


def test_the_package_asks_for_the_same_versions():
    setup = configparser.ConfigParser()
    setup.read(Path(bd3lm_hf.__file__).parent.parent / "setup.cfg", encoding="utf-8")
    requirements = map(Requirement, setup["options"]["install_requires"].split("\n")[1:])
    assert {r.specifier for r in requirements if r.name == "transformers"} == {SpecifierSet(TRANSFORMERS_VERSIONS)}


def test_a_saved_folder_states_the_versions(model_folder):
    assert json.loads((model_folder / "config.json").read_text())["requires_transformers"] == TRANSFORMERS_VERSIONS
    saved = (model_folder / "versions_bd3lm.py").read_bytes()
    assert saved == Path(versions_bd3lm.__file__).read_bytes()


# Another transformers than the one that runs, also one that lacks what the code imports.
ELSEWHERE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

# The import of `pipeline` makes these modules once more.
sys.modules["transformers"].__version__ = sys.argv[2]
del sys.modules["transformers.configuration_utils"].PreTrainedConfig
for load in (
    AutoConfig.from_pretrained,
    AutoModelForCausalLM.from_pretrained,
    lambda folder, **options: pipeline("text-generation", model=folder, **options),
):
    try:
        load(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
"""


def test_every_way_to_load_says_it_before_anything_else_fails(model_folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(model_folder), "4.57.1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "home")},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith(LINE.format("4.57.1")) for line in lines), lines


@pytest.mark.parametrize("name", ["configuration_bd3lm", "configuration_ssdlm"])
def test_the_check_is_the_first_thing_that_a_configuration_imports(name):
    source = (Path(versions_bd3lm.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports[0].startswith("from .versions_bd3lm import ")
