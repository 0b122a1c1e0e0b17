"""Small JSON and YAML files, also those of strangers: bounded in size and depth, and YAML without repeated keys."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml


_MAX_JSON_BYTES = 10_000_000  # ours have some kilobytes
_MAX_YAML_BYTES = 1_000_000
_MAX_VALUES = 100_000  # of a YAML file, whose aliases multiply: 480 bytes can stand for gigabytes


def read_json(path: str | Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if the file is too large, is not valid JSON, or holds something else than an object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of an object.")
    return content


def read_yaml(path: str | Path) -> Any:
    """Return the content of a small YAML file such as a recipe.

    Raises:
        ValueError: if the file is not readable YAML, repeats a key, or is too large, with its aliases written out.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise ValueError(f"{path} has more than {_MAX_YAML_BYTES:,} bytes, which is not a recipe.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES:,} values with its aliases written out.")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{path} is not readable YAML: it is nested too deeply.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not readable YAML ({error.problem}).") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error


def _count_values(node: Any, counted: dict[int, float]) -> float:
    """Return the number of values below a node, those of an alias as often as it is used.

    Raises:
        ValueError: if a mapping has a key twice.
    """
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = math.inf  # until it is known: an alias to a node around it has no end
    children = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        repeated = [key for key, count in Counter(keys).items() if count > 1 and key != "<<"]
        if repeated:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {repeated[0]!r} is there twice.")
        children = [child for pair in children for child in pair]
    counted[id(node)] = 1 + sum(_count_values(child, counted) for child in children)
    return counted[id(node)]
