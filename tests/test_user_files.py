import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm_hf.user_files import (
    LOCK_NAME,
    JsonLinesFile,
    check_output_file,
    is_json_with,
    lock_output,
    read_json,
    read_yaml,
    write_atomically,
)


class Killed(BaseException):
    """Simulates a SIGKILL."""


def test_a_foreign_file_is_refused_unless_overwrite_is_given(tmp_path):
    path = tmp_path / "out.json"
    ours = is_json_with("model", "scores")
    contents = {None: True, "": True, '{"model": 1, "scores": []}': True}
    for content, free in (contents | {'{"model": 1}': False, "notes": False, "[1]": False}).items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        if free:
            check_output_file(path, "--output", is_ours=ours)
        else:
            with pytest.raises(ValueError, match=r"--output .*out\.json.*--overwrite"):
                check_output_file(path, "--output", is_ours=ours)
            assert path.read_text() == content
        check_output_file(path, "--output", is_ours=ours, overwrite=True)


@pytest.mark.parametrize("name", ["no/such/file", "folder"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"--output .*{name}"):
        check_output_file(tmp_path / name, "--output")


def test_a_device_is_written_to_and_never_replaced():
    reader, writer = os.openpty()  # only this test uses it: replacing a shared device would break the machine
    try:
        device = os.ttyname(writer)
        check_output_file(device, "--output", is_ours=lambda path: False)
        write_atomically(device, "text")
        assert os.read(reader, 4) == b"text"
        with lock_output(device, "--output"), lock_output(device, "--output"):
            pass
        assert Path(device).is_char_device()
    finally:
        os.close(reader)
        os.close(writer)


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_links_are_not_followed_when_writing(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "results.json"
    victim.write_text("mine")
    path.symlink_to(victim)
    (tmp_path / ".results.json.incomplete").symlink_to(victim)
    write_atomically(path, "new")
    assert victim.read_text() == "mine"
    assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["results.json", "victim"]


SOURCE = str(Path(check_output_file.__code__.co_filename).parent)
HOLD = """
import os, sys, time
sys.path.insert(0, sys.argv[2])  # without the package, whose import takes seconds
from user_files import lock_output
with lock_output(sys.argv[1], "--output"):
    if not os.fork():  # like the worker of a data loader, which lets go of the lock before it does anything else
        print("locked", os.getpid(), flush=True)
        time.sleep(600)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["", "samples.jsonl"])
@pytest.mark.parametrize("end", ["release", "kill"])
def test_one_process_at_a_time_writes_to_an_output_even_if_its_workers_live_on(tmp_path, name, end):
    path = tmp_path / name
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path), SOURCE], **pipes) as holder:
        word, worker = holder.stdout.readline().split()
        try:
            with pytest.raises(ValueError, match=f"--output {path} is in use"), lock_output(path, "--output"):
                pass
            if end == "kill":
                holder.kill()
            holder.stdin.close()
            holder.wait()
            with lock_output(path, "--output"):
                pass
        finally:
            os.kill(int(worker), signal.SIGKILL)
    assert word == "locked" and os.listdir(tmp_path) == []


def test_the_lock_of_a_file_that_has_been_removed_does_not_count(tmp_path, monkeypatch):
    lock, open_file = tmp_path / LOCK_NAME, os.open

    def open_and_remove(path, *arguments, **options):
        descriptor = open_file(path, *arguments, **options)
        if Path(path) == lock:
            lock.unlink()  # as another process does that ends now
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_and_remove)
        with pytest.raises(ValueError, match="is in use"), lock_output(tmp_path, "--output"):
            pass
    with lock_output(tmp_path, "--output"):
        assert lock.exists()


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), lock_output(tmp_path, "--output"):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_line_that_a_signal_interrupted_may_be_written_again(tmp_path, monkeypatch):
    file = JsonLinesFile(tmp_path / "lines.jsonl", "--output", first_key="index", remedy="")
    file.write_line({"index": 0})

    open_file = Path.open

    @contextlib.contextmanager
    def interrupted(path, mode):
        with open_file(path, mode) as file:
            yield file
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "open", interrupted)
        file.write_line({"index": 1})
    file.write_line({"index": 1})
    assert [row for _, row in file.read_lines()] == [{"index": 0}, {"index": 1}]
    with (tmp_path / "lines.jsonl").open("a") as other:
        other.write("more")
    with pytest.raises(ValueError, match="another process changed it"):
        file.write_line({"index": 2})


def test_a_full_disk_is_reported_with_the_file():
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left.*'/dev/full'"):
        write_atomically(full, b"x")
    with pytest.raises(OSError, match="No space left.*'/dev/full'"):
        JsonLinesFile(full, "--output", first_key="index", remedy="").write_line({"index": 0})


# --- small inputs ----------------------------------------------------------------------------------------------------


# Each line multiplies the values by ten: 480 bytes expand to ten billion values.
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    "text",
    ["a: [1\n", "a: \x00\n", BOMB, "a: &a [*a]\n", "[" * 100_000, "a: 1\na: 2\n", "a: !!python/name:os.system\n"]
    + ["a: caf\xe9\n", "# " + "x" * 1_000_001],
    ids=["open", "control", "multiplied", "endless", "deep", "repeated", "tag", "other encoding", "large"],
)
def test_unreadable_yaml_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_aliases_and_merges_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("\ufeffa: &a {x: 1}\nb: {<<: *a, y: 2}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, '{"a": "' + "x" * 100 + '"}'])
def test_json_must_be_an_object_of_limited_size(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(path, max_bytes=50 if text.startswith("{") else 200_000)
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
