"""From a folder to the hub to a stranger's machine, over a real connection, whatever breaks on the way."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hub_server import TOKEN, USER, Fault, HubServer
from huggingface_hub import HfApi, file_download
from safetensors.torch import load_file
from sharing import no_check

from bd3lm_hf import (
    ARForCausalLM,
    BD3LMForMaskedLM,
    MDLMForMaskedLM,
    SEDDForMaskedLM,
)
from bd3lm_hf.hub_upload import push as push_module


REPO = f"{USER}/model"
IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11]])
WEIGHTS = "/cdn/"  # where the hub's large files come from


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """What is pushed here loads by itself, as these tests show."""
    monkeypatch.setitem(push_module.write_tree.__kwdefaults__, "check", no_check)


@pytest.fixture
def uploaded(hub, model_folder):
    """The model of `model_folder` on the hub."""
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    return load_file(model_folder / "model.safetensors")


@pytest.fixture
def families(tiny_tokenizer, randomize):
    """A model of each kind that reads and writes the text of the tiny tokenizer, by the name of its repository."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    sizes = {"model_length": 16, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "dropout": 0.0}
    fields = {**sizes, "vocab_size": len(tiny_tokenizer), **{name: getattr(tiny_tokenizer, name) for name in names}}
    heads = {"ar": ARForCausalLM, "mdlm": MDLMForMaskedLM, "sedd": SEDDForMaskedLM}
    return {f"{USER}/{name}": randomize(head(head.config_class(**fields))).eval() for name, head in heads.items()}


# What a stranger's process does with the names of repositories, without bd3lm_hf.
ELSEWHERE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bd3lm_hf":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
import transformers
from transformers import pipeline

torch.set_num_threads(1)
ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11]])
for repo, expected in torch.load(sys.argv[1]).items():
    write = pipeline("text-generation", model=repo, trust_remote_code=True)
    written = write("A", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert written.startswith("A") and len(written) > 1, (repo, written)
    models = [write.model]
    for auto_class in expected["classes"]:
        model, info = getattr(transformers, auto_class).from_pretrained(
            repo, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()), (repo, info)
        models.append(model.eval())
    for model in models:
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        with torch.no_grad():
            assert torch.equal(model(ids, **expected["inputs"]).logits, expected["logits"]), repo
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(text, expected["text"]), (repo, text, expected["text"])
    print("well:", repo)
assert not any(name.partition(".")[0] == "bd3lm_hf" for name in sys.modules)
"""


def test_every_model_loads_by_its_name(hub, families, bd3lm, model_folder, tiny_tokenizer, tmp_path):
    # 1. By the plain client, by transformers' own method, and by `bd3lm push`.
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    ar, *others = families
    families[ar].push_to_hub(ar)
    tiny_tokenizer.push_to_hub(ar)
    for repo in others:
        families[repo].save_pretrained(tmp_path / repo)
        tiny_tokenizer.save_pretrained(tmp_path / repo)
        code, _, err = bd3lm("push", tmp_path / repo, repo)
        assert code == 0, err
    # 2. Elsewhere, all is what it was here.
    expected = {}
    for repo, model in {REPO: BD3LMForMaskedLM.from_pretrained(model_folder).eval(), **families}.items():
        inputs = {"timesteps": torch.tensor([0.5])} if isinstance(model, SEDDForMaskedLM) else {}
        with torch.no_grad():
            logits = model(IDS, **inputs).logits
        text = model.generate(IDS, max_new_tokens=4, do_sample=False)
        # The pipeline loads it as a causal model; one other way is enough.
        classes = ["AutoModelForMaskedLM"] if repo == REPO else []
        expected[repo] = {"inputs": inputs, "logits": logits, "text": text, "classes": classes}
    torch.save(expected, tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, **hub.environment(tmp_path / "elsewhere")},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("well: ")[1:] == [f"{repo}\n" for repo in expected]
    assert TOKEN not in result.stdout + result.stderr and not hub.holds(TOKEN)


# --- up


@dataclass
class Meanwhile(Fault):
    """Somebody else commits to the repository just before a request arrives; the request itself goes well."""

    hub: HubServer | None = None

    def strikes(self, method: str, path: str) -> bool:
        if super().strikes(method, path):
            line = {"key": "file", "value": {"path": "theirs.txt", "content": "", "encoding": "base64"}}
            self.hub.repos[REPO].commit("main", [{"value": {"summary": "Theirs"}}, line], {}, False)
        return False


def push_fails(bd3lm, folder) -> str:
    code, out, err = bd3lm("push", folder, REPO)
    assert (code, out) == (1, "") and "Traceback" not in err and TOKEN not in err
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {REPO} can not be written: ")
    return line


def test_a_token_that_the_hub_does_not_know_makes_no_repository(hub, bd3lm, model_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    line = push_fails(bd3lm, model_folder)
    assert "the hub does not know your token" in line and "hf_another" not in line and not hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert bd3lm("push", model_folder, REPO)[0] == 0


def test_a_push_over_the_work_of_somebody_else_is_refused_and_the_next_keeps_it(hub, bd3lm, model_folder):
    hub.faults.append(Meanwhile("POST", "/commit/", times=1, hub=hub))
    assert "the repository was changed meanwhile: push again" in push_fails(bd3lm, model_folder)
    assert hub.repos[REPO].files().keys() == {".gitattributes", "theirs.txt"}
    assert bd3lm("push", model_folder, REPO)[0] == 0
    assert hub.repos[REPO].files().keys() > {"theirs.txt", "model.safetensors", "manifest.json"}


def test_a_commit_that_is_cut_in_the_middle_is_none(hub, bd3lm, model_folder):
    hub.faults.append(Fault("POST", "/commit/", times=1, cut=5000))
    push_fails(bd3lm, model_folder)
    assert hub.repos[REPO].files().keys() == {".gitattributes"}
    assert bd3lm("push", model_folder, REPO)[0] == 0 and "config.json" in hub.repos[REPO].files()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, bd3lm, model_folder):
    hub.faults.append(Fault("POST", "/commit/", times=1, lose=True))
    push_fails(bd3lm, model_folder)
    code, out, _ = bd3lm("push", model_folder, REPO)
    assert code == 0 and "nothing to do" in out and len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/lfs/", times=2, status=503),
        Fault("PUT", "/lfs/", times=2, cut=1000),
        Fault("POST", "/preupload/", times=2, status=500),
        Fault("POST", "/objects/batch", times=1, lose=True),
    ],
    ids=["503", "cut", "500", "lost"],
)
def test_what_passes_is_sat_out(hub, bd3lm, model_folder, fault):
    hub.faults.append(fault)
    assert bd3lm("push", model_folder, REPO)[0] == 0 and fault.times == 0
    assert hub.repos[REPO].files()["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


# --- down


def load_and_compare(weights) -> None:
    model = BD3LMForMaskedLM.from_pretrained(REPO)
    found = model.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_download_that_is_cut_goes_on_where_it_was(hub, uploaded, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    hub.faults.append(Fault("GET", WEIGHTS, times=2, cut=1000))
    load_and_compare(uploaded)
    ranges = [request.headers.get("range") for request in hub.asked("GET", WEIGHTS)]
    assert ranges == [None, "bytes=1000-", "bytes=2000-"]


def test_a_hub_that_hangs_is_asked_again(hub, uploaded, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hang = Fault("GET", WEIGHTS, times=1, delay=1.0)
    hub.faults.append(hang)
    load_and_compare(uploaded)
    # One request still hangs; another was answered.
    assert hang.times == 0 and len(hub.asked("GET", WEIGHTS)) == 1


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (Fault("GET", WEIGHTS, cut=0), "can not be loaded"),
        (Fault("GET", WEIGHTS, status=503), "503"),
        (Fault("HEAD", "/config.json", status=500), "can not be loaded"),
        (Fault("HEAD", "/config.json", status=401), "can not be loaded"),
        (Fault("HEAD", "/config.json", status=404), "can not be loaded"),
    ],
    ids=["cut", "503", "500", "401", "404"],
)
def test_a_failed_download_is_one_line_and_the_next_one_is_whole(hub, uploaded, bd3lm, fault, part):
    hub.faults.append(fault)
    code, out, err = bd3lm("generate", "--model", REPO, "--prompt", "A", "--max-new-tokens", "2")
    line = err.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in err and TOKEN not in err
    assert line.startswith(f"error: --model {REPO} can not be loaded; ") and part in line
    hub.faults.clear()
    load_and_compare(uploaded)


def test_a_full_disk_is_told_and_leaves_no_half_file_that_would_be_loaded(hub, uploaded, bd3lm, monkeypatch):
    whole = file_download.http_get

    class Full:
        """A file on a disk that is full after 1000 bytes."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[: max(0, 1000 - self.file.tell())])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", lambda url, file, **options: whole(url, Full(file), **options))
        code, out, err = bd3lm("generate", "--model", REPO, "--prompt", "A", "--max-new-tokens", "2")
    line = err.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in err
    assert line.startswith(f"error: --model {REPO} can not be loaded; ") and "No space left on device" in line
    load_and_compare(uploaded)


def test_without_a_hub_the_cache_still_loads(hub, uploaded):
    load_and_compare(uploaded)
    fetched = len(hub.asked("GET", WEIGHTS))
    hub.faults.extend([Fault("HEAD", ".", status=503), Fault("GET", ".", status=503)])
    load_and_compare(uploaded)
    assert len(hub.asked("GET", WEIGHTS)) == fetched == 1


def test_what_a_stranger_may_not_see_is_told_in_one_line(hub, uploaded, bd3lm, monkeypatch):
    hub.repos[REPO].private = True
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = bd3lm("generate", "--model", REPO, "--prompt", "A")
    assert code == 2 and err.splitlines()[-1].startswith(f"error: --model {REPO} can not be loaded; ")


def test_weights_that_end_too_early_are_not_loaded(hub, uploaded):
    good = next(iter(hub.objects))
    content, hub.objects[good] = hub.objects[good], hub.objects[good][:-100]
    with pytest.raises(OSError, match="size"):
        BD3LMForMaskedLM.from_pretrained(REPO)
    hub.objects[good] = content
    load_and_compare(uploaded)
