"""Prompt files are read line by line; a samples file keeps every finished sample, and no other file is touched."""

import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from bd3lm_hf.generation.generate_cli import read_prompts
from bd3lm_hf.generation.text_generation import Sample, SamplesFile, open_samples


PROMPTS = [None, "one", "two"]
SETTINGS = {"seed": 3, "temperature": 0.5}


def sample(index: int, settings: dict = SETTINGS) -> Sample:
    return Sample(
        index=index,
        prompt=PROMPTS[index],
        text=f"text {index}\u2028ä",
        num_prompt_tokens=1,
        num_tokens=2,
        seed=3,
        forwards=2,
        batch_forwards=2,
        tokens_per_forward=1.0,
        seconds=0.1,
        model="m",
        settings=settings,
    )


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "one\ntwo", ["one", "two"]),
        ("p.txt", "\n one\r\n\n  \ntwo \n\n", [" one", "two "]),
        ("p.txt", "\ufeffone\n", ["one"]),
        ("p.txt", "a\u2028b\nc\n", ["a\u2028b", "c"]),
        ("p.jsonl", '{"prompt": "a\\nb", "other": 1}\n\n{"prompt": "c"}\n', ["a\nb", "c"]),
    ],
)
def test_a_file_holds_a_prompt_per_line(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(None, str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.txt", b"", "p.txt"),
        ("p.txt", b"\n \n", "p.txt"),
        ("p.txt", b"ab\xff", "byte 2"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt', "line 2 of"),
        ("p.jsonl", b'{"text": "a"}\n', "line 1 of"),
        ("p.jsonl", b'[1]\n{"prompt": 2}\n', "line 1 of"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1 of"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1 of"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_line(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_prompts(None, str(tmp_path / name))


def test_prompts_come_from_the_command_line_or_standard_input(tmp_path):
    assert read_prompts(["a", "b\nc"], None) == ["a", "b\nc"]
    assert read_prompts(["-"], None, io.StringIO("a\nb\n")) == ["a", "b"]
    assert read_prompts(None, "-", io.StringIO("a\nb\n")) == ["a", "b"]
    assert read_prompts(None, None, io.StringIO("not a real file")) == [None]
    with (tmp_path / "piped").open("w+") as piped:
        assert read_prompts(None, None, piped) == [None]
        piped.write("a\n")
        piped.seek(0)
        assert read_prompts(None, None, piped) == ["a"]
    for wrong in ("", " ", "\udcff"):
        with pytest.raises(ValueError, match="--prompt 2"):
            read_prompts(["a", wrong], None)
    with pytest.raises(ValueError, match="nowhere.txt"):
        read_prompts(None, "nowhere.txt")


def test_a_silent_pipe_is_not_waited_for():
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        assert read_prompts(None, None, stdin) == [None]
    os.close(writer)


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "samples.jsonl"


def test_samples_are_lines_of_json_that_a_second_run_finds(path):
    first = SamplesFile(path, PROMPTS, SETTINGS)
    assert first.finished == set() and first.rows() == []
    first.append([sample(2), sample(0)])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [asdict(sample(2)), asdict(sample(0))]
    second = SamplesFile(path, PROMPTS, SETTINGS)
    assert second.finished == {0, 2} and [row["index"] for row in second.rows()] == [0, 2]
    second.append([sample(0), sample(1)])
    assert [row["index"] for row in SamplesFile(path, PROMPTS, SETTINGS).rows()] == [0, 1, 2]


def test_half_a_line_of_a_killed_run_is_cut_off(path):
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0), sample(1)])
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[: -len(whole.splitlines(keepends=True)[1])] + whole.splitlines()[1][:cut])
        file = SamplesFile(path, PROMPTS, SETTINGS)
        assert file.finished == {0}
        file.append([sample(1)])
        assert path.read_bytes() == whole


def test_each_sample_is_on_disk_before_the_next_is_taken(path):
    def samples():
        for index in range(3):
            assert (path.read_bytes().count(b"\n") if path.exists() else 0) == index
            yield sample(index)

    SamplesFile(path, PROMPTS, SETTINGS).append(samples())


@pytest.mark.parametrize(
    ("prompts", "settings", "match"),
    [
        (PROMPTS, {"seed": 3, "temperature": 0.9}, "temperature is 0.5 there and 0.9 now"),
        (PROMPTS, {"seed": 3}, "temperature is 0.5 there and None now"),
        (PROMPTS, {**SETTINGS, "top_k": 5}, "top_k is None there and 5 now"),
        (["new"], SETTINGS, "prompt is None there and 'new' now"),
    ],
)
def test_samples_of_other_settings_are_refused_by_name(path, prompts, settings, match):
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0)])
    with pytest.raises(ValueError, match=match):
        SamplesFile(path, prompts, settings)


def test_the_old_file_stays_until_the_first_new_sample(path):
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0), sample(1)])
    before = path.read_bytes()
    file = SamplesFile(path, PROMPTS, {"seed": 4}, overwrite=True)
    assert file.finished == set() and path.read_bytes() == before
    file.append([])
    assert path.read_bytes() == before
    file.append([sample(2, {"seed": 4}), sample(0, {"seed": 4})])
    assert [row["index"] for row in map(json.loads, path.read_text().split("\n")[:-1])] == [2, 0]


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"a text\n",
            b"a text",
            b'{"index": "0", "settings": {}}\n',
            b'{"index": 0}\n',
            b"[]\n",
            b"\x89PNG\r\n\x1a\n",
        ),
        *(b'{"index": 0, "settings": 3}\n', b'{"results": 1}', b"\n", b"\x00\x00", b"[" * 100_000 + b"\n"),
    ],
)
def test_a_file_of_something_else_stays_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="--samples .*--overwrite"):
        SamplesFile(path, PROMPTS, SETTINGS, flag="--samples")
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", [b"", b'{"index": 9}\n'])
def test_a_file_that_somebody_else_changes_is_not_written_to(path, change):
    file = SamplesFile(path, PROMPTS, SETTINGS)
    file.append([sample(0)])
    path.write_bytes(change)
    with pytest.raises(ValueError, match=f"{len(change)} bytes"):
        file.append([sample(1)])
    assert path.read_bytes() == change


def test_a_second_run_on_the_same_file_is_refused(path):
    with open_samples(path, PROMPTS, SETTINGS) as file:
        file.append([sample(0)])
        with pytest.raises(ValueError, match=f"--output .*{os.getpid()}"), open_samples(path, PROMPTS, SETTINGS):
            pass
    with open_samples(path, PROMPTS, SETTINGS) as file:
        assert file.finished == {0}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
