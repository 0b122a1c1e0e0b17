import pytest

from bd3lm_hf.input_files import read_json, read_yaml


# Each line multiplies the values by ten: 480 bytes hold ten thousand million of them.
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    "text",
    ["a: [1\n", "a: \x00\n", BOMB, "a: &a [*a]\n", "[" * 100_000, "a: 1\na: 2\n", "a: !!python/name:os.system\n"],
    ids=["open", "control", "multiplied", "endless", "deep", "repeated", "tag"],
)
def test_unreadable_yaml_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_a_large_file_and_another_encoding_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    for content in (b"a: caf\xe9\n", b"# " + b"x" * 1_000_001):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"recipe\.yaml"):
            read_yaml(path)


def test_aliases_and_merges_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("\ufeffa: &a {x: 1}\nb: {<<: *a, y: 2}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, '{"a": "' + "x" * 100 + '"}'])
def test_json_of_strangers_is_an_object_of_a_bounded_size(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(path, max_bytes=50 if text.startswith("{") else 200_000)
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
