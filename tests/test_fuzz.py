"""Random command lines and random damage: an error is one line, and nothing that is not ours is touched.

Everything is seeded. A failure prints the command line or the damage.
"""

import argparse
import io
import json
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_models import add_run, special_ids

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, cli


SECRET = "what-is-in-a-private-file"
HOSTILE = (
    *("", " ", "-", "--", "nowhere", "new/none/x", ".", "..", "/", "/dev/null", "link", "link/secret.txt", "a" * 300),
    *("0", "-1", "1.5", "9" * 25, "1e400", "nan", "inf", "x", "None", "[1]", "{}", "\x1b[2K\rintact", "\0", "é\udcff"),
    *("meta", "cuda:99", "notes.txt", "data.json", "picture.png", "empty", "rows.jsonl", "broken.safetensors"),
)
# Valid values by the name of the flag; those of other flags are choices or numbers.
FITTING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "judge", "tokenizer", "source", "folder", "model_folder"), ("model",)),
    **dict.fromkeys(("dataset", "dataset_source", "suite_source"), ("text.txt", "rows.jsonl")),
    **dict.fromkeys(("prompt_file", "text_file"), ("prompts.txt",)),
    **dict.fromkeys(("prompt", "text"), ("The quick ___ fox", "A ___")),
    **dict.fromkeys(("target", "dry_run"), ("fresh-folder",)),
    **dict.fromkeys(("length", "window"), ("8",)),
}
FITTING |= {"output": ("fresh.json", "fresh.jsonl", "fresh.html", "fresh.csv"), "trace": ("fresh.html", "fresh.json")}
FITTING |= {"samples": ("fresh.jsonl",), "plot": ("fresh.png",), "runs": ("run", "fresh.json"), "repo": ("me/model",)}
FITTING |= {"split": ("train", "validation"), "revision": ("main",), "device": ("cpu",)}
FITTING |= {"gap": ("___",), "gap_tokens": ("2",)}
# Words that keep successful commands short, and words that those verbs need.
SHORT: dict[str, list[str]] = {
    "generate": ["--model", "model", "--max-new-tokens", "3"],
    "infill": ["--model", "model", "--text", "A ___ is"],
    "eval": ["--model", "model", "--dataset", "text.txt", "--max-sequences", "2"],
    "eval --generative": ["--model", "model", "--judge", "model", "--num-samples", "2", "--length", "4"],
    "quality": ["--model", "model", "--num-samples", "2", "--new-tokens", "2", "--num-denoising-steps", "1"]
    + ["--confidence-threshold", "0.5", "--entropy-bound", "1"],
}
# Too slow to succeed here, or they never end: each line has a word that is wrong.
WRONG: dict[str, tuple[list[str], ...]] = {
    "serve": (["nowhere"], ["model", "--port", "-1"], ["model", "--dtype", "int3"], ["model", "--max-tokens", "0"]),
    "bench": (["--repeats", "0"], ["--estimators", "none:0"], ["--noise-draws", "0"], ["--lengths", "-1"]),
}
LINES = {"generate": 90, "infill": 60, "eval": 60, "eval --generative": 40, "convert": 50, "push": 50, "verify": 40}
LINES |= {"report": 40, "quality": 15, "serve": 30, "bench": 30}


# --- a world of files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, _tiny_tokenizer_json) -> Path:
    """A folder with a model, a run, texts, and foreign files."""
    from conftest import make_tiny_tokenizer

    world = tmp_path_factory.mktemp("pristine")
    tokenizer = make_tiny_tokenizer(_tiny_tokenizer_json)
    sizes = {"block_size": 4, "model_length": 16, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2}
    torch.manual_seed(0)
    config = BD3LMConfig(vocab_size=len(tokenizer), **sizes, **special_ids(tokenizer))
    BD3LMForMaskedLM(config).save_pretrained(world / "model")
    tokenizer.save_pretrained(world / "model")
    shutil.copytree(world / "model", world / "run")
    add_run(world / "run")
    (world / "empty").mkdir()
    (world / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 12)
    (world / "prompts.txt").write_text("The quick\n\nA block ___\n")
    (world / "rows.jsonl").write_text('{"text": "The quick brown fox"}\n' * 12)
    (world / "notes.txt").write_text("not ours, without a newline")
    (world / "data.json").write_text('{"index": 0, "not": "ours"}')
    (world / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (world / "broken.safetensors").write_bytes(struct.pack("<Q", 2**60))
    return world


@pytest.fixture
def world(pristine, tmp_path, monkeypatch, no_load_check) -> Path:
    """A copy of that folder to work in, with a link that leads out of it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET)
    world = shutil.copytree(pristine, tmp_path / "world")
    (world / "link").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.stdin", io.StringIO("The ___ fox\n"))
    return world


def files_in(folder: Path) -> dict[str, int]:
    """Return a checksum of every file, the target of every link, and 0 for a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = zlib.crc32(content)
    return found


def restore(world: Path, pristine: Path, before: dict[str, int]) -> None:
    """Restore the original files."""
    after = files_in(world)
    for name in sorted(after, reverse=True):
        path = world / name
        if after[name] != before.get(name):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in before:
        if after.get(name) != before[name] and (pristine / name).is_file():
            shutil.copyfile(pristine / name, world / name)


def run_and_check(bd3lm: Any, world: Path, words: list[str], before: dict[str, int], ours: set[str]) -> int:
    """Run a command line: check that it exits with 0 or 2, prints one line of error, and changes only its outputs."""
    outside = files_in(world.parent / "outside")
    code, out, err = bd3lm(*words)
    lines = err.splitlines()
    if code == 2:
        assert [line.startswith("error: ") for line in lines].index(True) == len(lines) - 1, err
    # `verify` exits with 1 if a folder differs or cannot be downloaded.
    assert code in ((0, 1, 2) if words[0] == "verify" else (0, 2)), err
    assert "Traceback" not in err and "\x1b[2K" not in out + err and SECRET not in out + err
    after = files_in(world)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert code == 0 or not changed, f"refused, but changed {changed}: {err}"
    assert {name for name in changed if not any(name.startswith(own) for own in ours)} == set()
    if "--overwrite" not in words:
        assert not changed & before.keys(), "overwritten"
    assert files_in(world.parent / "outside") == outside
    return code


# --- command lines ---------------------------------------------------------------------------------------------------


def value_of(rng: random.Random, action: argparse.Action) -> str:
    """Return a mostly valid value for a flag."""
    if rng.random() < 0.3:
        return rng.choice(HOSTILE)
    if action.choices is not None:
        return str(rng.choice(list(action.choices)))
    return rng.choice(FITTING.get(action.dest, ("1", "2", "0.5")))


def command_line(rng: random.Random, verb: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return the words that a verb needs, a few random flags, and sometimes a typo."""
    words = [*SHORT.get(verb, []), *rng.choice(WRONG.get(verb, ([],)))]
    actions = [action for action in parser._actions if action.dest not in ("help", "traceback")]
    for action in actions:
        if not action.option_strings and verb != "serve":
            words += [value_of(rng, action)]
    flags = [action for action in actions if action.option_strings]
    for action in rng.sample(flags, min(len(flags), rng.randint(0, 3))):
        flag = rng.choice(action.option_strings)
        flag = "--" + flag[2:].replace("-", "_") if rng.random() < 0.2 and verb in SHORT else flag
        if action.nargs == 0:
            words.append(flag)
        elif rng.random() < 0.2:
            words.append(f"{flag}={value_of(rng, action)}")
        else:
            words += [flag, value_of(rng, action)]
    if words and rng.random() < 0.15:
        words.insert(rng.randrange(len(words) + 1), rng.choice(("--modle", "--", "extra", "--traceback=", "-x", "")))
    return [*verb.split(), *words]


@pytest.mark.parametrize("verb", LINES)
@pytest.mark.filterwarnings("ignore")
def test_a_command_line_ends_well(bd3lm, world, pristine, verb):
    rng = random.Random(verb)
    name, *given = verb.split()
    parser = cli.make_verb_parser(name, given)
    before = files_in(world)
    for _ in range(LINES[verb]):
        words = command_line(rng, verb, parser)
        print(words)
        # Outputs that are not named have default names.
        ours = {word.partition("=")[2] or word for word in words} | {"samples.jsonl", "report.html", "fresh"}
        run_and_check(bd3lm, world, words, before, ours - {"", "."})
        restore(world, pristine, before)


# --- damaged models --------------------------------------------------------------------------------------------------

VALUES = (None, "x", "", -1, 0, 1, 7, 1.5, True, [], {}, [1, "a"], {"a": 1}, 10**30, 1e308, float("nan"), float("inf"))
VALUES += ("\x1b[2K\rintact", "../../x", "os.system", "evil--code.Model", ["x"] * 50)  # type: ignore[assignment]


def change_json(rng: random.Random, path: Path) -> None:
    """Give a random field a random value, or remove it."""
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content))
    if rng.random() < 0.1:
        del content[name]
    else:
        content[name] = rng.choice(VALUES)
    path.write_text(json.dumps(content))
    print(path.name, name, content.get(name, "removed"))


def some_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))


def cut(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    content = bytearray(path.read_bytes())
    for _ in range(4):
        content[rng.randrange(min(len(content), 3000))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def replace(rng: random.Random, folder: Path) -> None:
    wrong = (b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a": ' + b"9" * 6000 + b"}", b"\xff")
    contents = (*wrong, "{}".encode("utf-16"))
    some_file(rng, folder).write_bytes(rng.choice(contents))


def remove(rng: random.Random, folder: Path) -> None:
    some_file(rng, folder).unlink()


def link_out(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    path.unlink()
    path.symlink_to(rng.choice((folder.parent / "link" / "secret.txt", path, folder / "nowhere", folder.parent)))


def folder_in_place(rng: random.Random, folder: Path) -> None:
    path = some_file(rng, folder)
    path.unlink()
    path.mkdir()


def change_weights(rng: random.Random, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = rng.choice(sorted(weights))
    wrong = weights[name].clone().float()
    change = rng.choice(("nan", "inf", "shape", "integer", "missing", "extra"))
    print(name, change)
    if change in ("nan", "inf"):
        weights[name] = wrong.fill_(float(change))
    elif change == "shape":
        weights[name] = wrong.repeat(2) if wrong.dim() else wrong.repeat(3)
    elif change == "integer":
        weights[name] = wrong.long()
    else:
        weights.pop(name) if change == "missing" else weights.update(extra=wrong)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def hostile_index(rng: random.Random, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    names = sorted(load_file(folder / "shard.safetensors"))
    shard = rng.choice(("../broken.safetensors", "/etc/passwd", "nowhere.safetensors", "", None, 3, ["x"], "shard\0"))
    content = rng.choice(({"weight_map": dict.fromkeys(names, shard)}, {"weight_map": [shard]}, [shard], {}))
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


DAMAGES: dict[str, tuple[int, Any]] = {
    "config": (90, lambda rng, folder: change_json(rng, folder / "config.json")),
    "generation config": (40, lambda rng, folder: change_json(rng, folder / "generation_config.json")),
    "tokenizer config": (40, lambda rng, folder: change_json(rng, folder / "tokenizer_config.json")),
    "tokenizer": (15, lambda rng, folder: change_json(rng, folder / "tokenizer.json")),
    "cut": (25, cut),
    "flip": (25, flip),
    "replace": (20, replace),
    "remove": (10, remove),
    "link": (15, link_out),
    "folder": (8, folder_in_place),
    "weights": (20, change_weights),
    "index": (15, hostile_index),
}
USES: tuple[list[str], ...] = (
    ["generate", "--model", "model", "--max-new-tokens", "2"],
    ["infill", "--model", "model", "--text", "A ___ is"],
    ["eval", "--model", "model", "--dataset", "text.txt", "--max-sequences", "1"],
    ["convert", "model", "fresh-folder"],
    ["push", "model", "me/model", "--dry-run", "fresh-folder"],
    ["verify", "model"],
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_model_is_refused_or_works(bd3lm, world, pristine, damage):
    rng = random.Random(damage)
    count, change = DAMAGES[damage]
    for _ in range(count):
        change(rng, world / "model")
        before = files_in(world)
        words = rng.choice(USES)
        print(words)
        code = run_and_check(bd3lm, world, words, before, {"fresh-folder"})
        made = [path for path in (world / "fresh-folder").rglob("*") if path.is_file()]
        assert code or not any(SECRET in path.read_text(errors="replace") for path in made)
        shutil.rmtree(world / "fresh-folder", ignore_errors=True)
        shutil.rmtree(world / "model")
        shutil.copytree(pristine / "model", world / "model")
