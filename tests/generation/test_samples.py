"""Prompts are read as they are meant, and a samples file never mixes what does not belong together."""

import io
import json
import os

import pytest

from bd3lm_hf.generation.samples import Sample, SamplesFile, read_prompts


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_come_as_they_are_given():
    assert read_prompts(["one", " two\nlines "], None) == ["one", " two\nlines "]


def test_a_file_holds_a_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffnaïve café\r\n  indented\r\nlast".encode())
    assert read_prompts(None, str(file)) == ["naïve café", "  indented", "last"]


def test_a_json_lines_file_holds_prompts_of_several_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\nb", "other": 1}\n{"prompt": "c"}\n')
    assert read_prompts(None, str(file)) == ["a\nb", "c"]


@pytest.mark.parametrize("arguments", [(["-"], None), (None, "-")])
def test_a_dash_is_standard_input(arguments):
    assert read_prompts(*arguments, io.StringIO("one\ntwo\n")) == ["one", "two"]


def piped(content: bytes | None) -> io.TextIOWrapper:
    """The reading end of a pipe; None: the other end stays open and silent."""
    reading, writing = os.pipe()
    if content is None:
        stream = os.fdopen(reading, encoding="utf-8")
        stream.writer = os.fdopen(writing, "w")  # lives as long
        return stream
    os.write(writing, content)
    os.close(writing)
    return os.fdopen(reading, encoding="utf-8")


def test_what_is_piped_in_is_read_without_a_flag():
    with piped(b"one\ntwo\n") as stream:
        assert read_prompts(None, None, stream) == ["one", "two"]


def test_named_prompts_leave_a_pipe_alone():
    with piped(b"one\n") as stream:
        assert read_prompts(["two"], None, stream) == ["two"]
        assert stream.read() == "one\n"


def test_without_a_prompt_a_text_starts_from_nothing():
    with piped(b"") as empty, piped(None) as silent, open(os.devnull) as nothing:
        for stream in (empty, silent, nothing, io.StringIO("not a real file")):
            assert read_prompts(None, None, stream) == [None]
        silent.writer.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, "p.txt: there is no such file"),
        ("p.txt", b"", "p.txt holds no prompt: write one prompt per line"),
        ("p.txt", b"\n", "line 1 of .*p.txt is an empty prompt: remove it"),
        ("p.txt", b"one\n \nthree\n", "line 2 of .*p.txt is an empty prompt"),
        ("p.txt", b"ab\xff", "p.txt is not UTF-8: byte 2 can not be decoded"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt', "line 2 of .*p.jsonl is no JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'line 1 of .*p.jsonl has no prompt: write objects such as {"prompt": "Once"}'),
        ("p.jsonl", b'["a"]\n', "line 1 of .*p.jsonl has no prompt"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1 of .*p.jsonl has no prompt"),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1 of .*p.jsonl is an empty prompt"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(None, str(tmp_path / name))


def test_empty_prompts_and_an_empty_standard_input_are_refused():
    with pytest.raises(ValueError, match="--prompt 2 is an empty prompt"):
        read_prompts(["a", ""], None)
    with pytest.raises(ValueError, match="standard input holds no prompt"):
        read_prompts(["-"], None, io.StringIO(""))


# --- the samples file ------------------------------------------------------------------------------------------------

SETTINGS = {"seed": 3, "temperature": 0.5}
PROMPTS = ["one", "one", None]


def sample(index: int, **changes) -> Sample:
    fields = {
        "index": index,
        "prompt": PROMPTS[index],
        "text": "naïve\n",
        "num_prompt_tokens": 1,
        "num_tokens": 4,
        "seed": 3,
        "forwards": 4,
        "tokens_per_forward": 1.0,
        "seconds": 0.5,
        "model": "m",
        "settings": SETTINGS,
    }
    return Sample(**{**fields, **changes})


def test_samples_are_lines_of_json_that_a_second_run_finds(tmp_path):
    path = tmp_path / "samples.jsonl"
    first = SamplesFile(path, PROMPTS, SETTINGS)
    assert not path.exists()  # nothing is written before there is something to write
    first.append([sample(0)])
    first.append([sample(1)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["index"] for row in rows] == [0, 1] and rows[0]["text"] == "naïve\n"
    second = SamplesFile(path, PROMPTS, SETTINGS)
    assert second.finished == {0, 1}
    second.append([sample(1, text="again"), sample(2)])
    assert path.read_text().count("\n") == 3 and "again" not in path.read_text()


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    path = tmp_path / "samples.jsonl"
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0), sample(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    file = SamplesFile(path, PROMPTS, SETTINGS)
    assert file.finished == {0}
    file.append([sample(1)])
    assert path.read_bytes() == whole


def test_each_sample_is_on_disk_before_the_next_is_asked_for(tmp_path):
    path = tmp_path / "samples.jsonl"
    counts = []

    def samples():
        for index in range(3):
            yield sample(index)
            counts.append(path.read_text().count("\n"))

    SamplesFile(path, PROMPTS, SETTINGS).append(samples())
    assert counts == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (PROMPTS, {**SETTINGS, "temperature": 0.9}, r"other settings \(temperature is 0.5 there and 0.9 now\)"),
        (PROMPTS, {"seed": 3}, "temperature is 0.5 there and None now"),
        (PROMPTS, {**SETTINGS, "top_k": 5}, "top_k is None there and 5 now"),
        (["two", "one"], SETTINGS, "prompt is 'one' there and 'two' now"),
    ],
)
def test_samples_of_other_settings_are_refused_by_name(tmp_path, prompts, settings, message):
    path = tmp_path / "samples.jsonl"
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"line 1 .*{message}.*--overwrite"):
        SamplesFile(path, prompts, settings)
    assert path.read_bytes() == before


def test_overwriting_starts_anew_with_the_first_sample(tmp_path):
    path = tmp_path / "samples.jsonl"
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0), sample(1)])
    file = SamplesFile(path, PROMPTS, {"seed": 4}, overwrite=True)
    assert file.finished == set() and path.read_text().count("\n") == 2
    file.append([sample(2)])
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize("content", ["a text\n", '{"index": "0", "settings": {}}\n', '{"index": 0}\n', "[]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1 is no sample of this command; name another file, or replace it"):
        SamplesFile(path, PROMPTS, SETTINGS)
    assert path.read_text() == content


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the folder .*nowhere does not exist; make it first"):
        SamplesFile(tmp_path / "nowhere" / "samples.jsonl", PROMPTS, SETTINGS)
    with pytest.raises(ValueError, match="is a folder: name a file"):
        SamplesFile(tmp_path, PROMPTS, SETTINGS)
