"""`bd3lm push`: wrong input is refused before any work, an upload is one commit of the dry run's files, or nothing."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import TOKEN, USER, Fault
from huggingface_hub import constants
from shared_models import JUNK, add_run, make_adapter, special_ids
from test_cli import assert_refused

from bd3lm_hf import BD3LMForMaskedLM, SEDDForMaskedLM
from bd3lm_hf.hub_upload import load_check
from bd3lm_hf.hub_upload import push as push_module
from bd3lm_hf.hub_upload.load_check import CheckError
from bd3lm_hf.hub_upload.push import dry_run, push, write_repository
from bd3lm_hf.hub_upload.repo_files import files_of, is_allowed
from bd3lm_hf.modeling.compatibility_bd3lm import SelfContainedMixin


REPO = f"{USER}/model"


def no_check(folder, model):
    pass


@pytest.fixture
def run_folder(model_folder):
    return add_run(model_folder)


@pytest.fixture
def expected(run_folder, tmp_path):
    """The files that a push of `run_folder` uploads."""
    dry_run(run_folder, REPO, tmp_path / "expected", check=no_check)
    return {name: path.read_bytes() for name, path in files_of(tmp_path / "expected").items()}


def test_a_push_is_one_commit_of_the_files_of_a_dry_run_and_is_not_repeated(hub, bd3lm, run_folder, tmp_path):
    code, out, err = bd3lm("push", run_folder, REPO, "--dry-run", tmp_path / "out", "--license", "mit")
    files = {name: path.read_bytes() for name, path in files_of(tmp_path / "out").items()}
    assert (code, err) == (0, "") and not hub.repos and all(f"{name}  " in out for name in files)
    assert "left out: .env, ema.json, notes.py, optimizer.pt, recipe.yaml" in out
    assert not any(name in files for name in JUNK) and {"README.md", "manifest.json"} < files.keys()
    assert b"HF_TOKEN" not in b"".join(files.values())
    code, out, err = bd3lm("push", run_folder, REPO, "--license", "mit", "--private", "--message", "Hello")
    assert (code, err) == (0, "") and "/commit/" in out
    assert hub.repos[REPO].files() == files and hub.repos[REPO].private
    assert [commit["summary"] for commit in hub.commits(REPO)] == ["Hello"]
    code, out, _ = bd3lm("push", run_folder, REPO, "--license", "mit")
    assert code == 0 and f"nothing to do: {REPO}" in out
    assert len(hub.commits(REPO)) == len(hub.asked("PUT", "/lfs/")) == len(hub.asked("POST", "/commit/")) == 1


def test_only_changed_files_are_sent_and_those_of_an_earlier_push_are_removed(hub, bd3lm, run_folder):
    push(run_folder, REPO)
    repo = hub.repos[REPO]
    for name in ("app.py", "pytorch_model.bin", "onnx/model.bin"):
        repo.put(name, b"theirs")
    stale = repo.files()["manifest.json"].replace(b'"noise_bd3lm.py"', b'"gone_bd3lm.py"')
    repo.put("manifest.json", b"[]")  # a foreign one, which removes nothing
    done, _ = push(run_folder, REPO)
    assert done.changed and done.removed == ["pytorch_model.bin"] and repo.files()["app.py"] == b"theirs"
    for name, content in (("pytorch_model.bin", b"theirs"), ("manifest.json", stale), ("gone_bd3lm.py", b"old")):
        repo.put(name, content)
    code, out, _ = bd3lm("push", run_folder, REPO, "--max-shard-size", "20KB")
    assert code == 0 and "removed gone_bd3lm.py, model.safetensors, pytorch_model.bin" in out
    files = repo.files()
    assert {"app.py", "onnx/model.bin", "model.safetensors.index.json", "noise_bd3lm.py"} < files.keys()
    assert not {"gone_bd3lm.py", "model.safetensors", "pytorch_model.bin"} & files.keys()


def test_branches_and_pull_requests_leave_main_alone(hub, bd3lm, run_folder, expected):
    assert bd3lm("push", run_folder, REPO, "--revision", "v1")[0] == 0
    assert hub.repos[REPO].files("v1") == expected and hub.repos[REPO].files() == {}
    code, out, _ = bd3lm("push", run_folder, REPO, "--create-pr")
    assert code == 0 and "/discussions/1" in out
    assert hub.repos[REPO].files("refs/pr/1") == expected and hub.repos[REPO].files() == {}


@pytest.mark.parametrize("options", [{"revision": "refs/pr/7"}, {"revision": "v2", "create_pr": True}])
def test_a_pull_request_needs_a_branch_that_exists(hub, run_folder, options):
    with pytest.raises(OSError, match=REPO):
        push(run_folder, REPO, **options)
    assert not hub.commits(REPO)


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (Fault("POST", "/commit/", 503), "try again later"),
        (Fault("POST", "/commit/", 409), "push again"),
        (Fault("POST", "/repos/create", 401), "hf auth login"),
        (Fault("POST", "/preupload/", 403), "permission"),
        (Fault("PUT", "/lfs/", 413), "--max-shard-size"),
        (Fault("POST", "/preupload/", 429), "later"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Fault) else "",
)
def test_a_failed_push_changes_nothing_and_the_next_completes_it(hub, bd3lm, run_folder, expected, fault, remedy):
    hub.faults.append(fault)
    code, out, err = bd3lm("push", run_folder, REPO)
    line = err.splitlines()[-1]
    assert (code, out) == (1, "") and "Traceback" not in err and TOKEN not in err
    assert line.startswith("error: ") and REPO in line and remedy in line
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}
    hub.faults.clear()
    assert bd3lm("push", run_folder, REPO)[0] == 0 and hub.repos[REPO].files() == expected


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, bd3lm, run_folder):
    hub.faults.append(Fault("POST", "/commit/", 0))
    assert bd3lm("push", run_folder, REPO)[0] == 1
    hub.faults.clear()
    assert "nothing to do" in bd3lm("push", run_folder, REPO)[1] and len(hub.commits(REPO)) == 1


def test_a_commit_by_somebody_else_in_the_meantime_is_kept(hub, run_folder, monkeypatch):
    push(run_folder, REPO)

    def meanwhile(*arguments):
        hub.repos[REPO].put("theirs.txt", b"theirs")
        return set()

    with monkeypatch.context() as patch:
        patch.setattr(push_module, "_outdated", meanwhile)
        with pytest.raises(OSError, match="push again"):
            push(run_folder, REPO, license="mit")
    assert "license: mit" not in hub.repos[REPO].files()["README.md"].decode()
    assert push(run_folder, REPO, license="mit")[0].changed and "theirs.txt" in hub.repos[REPO].files()


def test_the_model_verifies_and_generates_by_its_name(hub, bd3lm, run_folder, expected):
    assert bd3lm("push", run_folder, REPO, "--private")[0] == 0
    code, out, err = bd3lm("verify", REPO)
    assert code == 0 and "intact: " in out and TOKEN not in out + err
    assert bd3lm("verify", f"{USER}/nowhere")[0] == bd3lm("verify", REPO, "--revision", "v9")[0] == 2
    hub.faults.append(Fault("GET", "/api/models", 503))
    code, _, err = bd3lm("verify", f"{USER}/other")
    assert code == 1 and f"{USER}/other" in err
    hub.faults.clear()
    options = ("--prompt", "A", "--max-new-tokens", "2")
    code, out, err = bd3lm("generate", "--model", f"{USER}/other", *options)
    assert (code, out) == (2, "") and "Traceback" not in err and f"{USER}/other" in err.splitlines()[-1]
    assert bd3lm("generate", "--model", REPO, *options)[0] == 0


# Run by a process that has no bd3lm_hf, with the names of repositories and the expected outputs.
ELSEWHERE = """
import re
import sys
import huggingface_hub
import torch
import transformers
from bd3lm_check import block_bd3lm_hf

block_bd3lm_hf()
torch.set_num_threads(1)
for repo, expected in torch.load(sys.argv[1]).items():
    pipe = transformers.pipeline("text-generation", model=repo, trust_remote_code=True)
    assert pipe("A", max_new_tokens=4)[0]["generated_text"].startswith("A"), repo
    assert type(pipe.model).__module__.startswith("transformers_modules"), type(pipe.model)
    with torch.no_grad():
        assert torch.equal(pipe.model(expected["ids"], **expected["inputs"]).logits, expected["logits"]), repo
    with open(huggingface_hub.hf_hub_download(repo, "README.md"), encoding="utf-8") as card:
        for snippet in re.findall(r"```python\\n(.*?)```", card.read(), flags=re.DOTALL)[1:]:
            exec(snippet)
print("loaded")
"""


def test_models_load_elsewhere_and_their_snippets_run_without_a_question(hub, tiny_tokenizer, randomize, tmp_path):
    sizes = {"model_length": 32, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "dropout": 0.0}
    fields = {**sizes, "vocab_size": len(tiny_tokenizer), **special_ids(tiny_tokenizer)}
    ids, expected = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11]]), {}
    for head in (BD3LMForMaskedLM, SEDDForMaskedLM):
        model, repo = randomize(head(head.config_class(**fields))).eval(), f"{USER}/{head.config_class.model_type}"
        model.save_pretrained(tmp_path / repo)
        tiny_tokenizer.save_pretrained(tmp_path / repo)
        push(tmp_path / repo, repo)
        inputs = {"timesteps": torch.tensor([0.5])} if head is SEDDForMaskedLM else {}
        with torch.no_grad():
            expected[repo] = {"ids": ids, "inputs": inputs, "logits": model(ids, **inputs).logits}
    torch.save(expected, tmp_path / "expected.pt")
    shutil.copy(load_check.__file__, tmp_path / "bd3lm_check.py")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "expected.pt")]
    environment = {**os.environ, "PYTHONPATH": "", **hub.environment(tmp_path / "elsewhere")}
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    result = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert result.returncode == 0 and result.stdout.endswith("loaded\n"), result.stderr
    assert "Do you wish" not in result.stdout
    assert TOKEN not in result.stdout + result.stderr and not hub.holds(TOKEN)


def test_save_pretrained_and_push_to_hub_upload_what_push_does(hub, run_folder, expected):
    model = BD3LMForMaskedLM.from_pretrained(run_folder)
    model.save_pretrained(run_folder, push_to_hub=True, repo_id=REPO, commit_message="Mine")
    assert hub.repos[REPO].files() == expected and hub.commits(REPO)[0]["summary"] == "Mine"
    assert (run_folder / "README.md").read_bytes() == expected["README.md"]
    model.add_model_tags("mine")
    assert "/commit/" in model.push_to_hub(f"{USER}/other", private=True)
    files = hub.repos[f"{USER}/other"].files()
    assert files.keys() == {name for name in expected if not name.startswith("tokenizer")}
    assert b"- mine\n" in files["README.md"]
    model.config.mask_token_id = 9
    with pytest.raises(ValueError, match="mask_token_id is 9"):
        model.save_pretrained(run_folder, push_to_hub=True, repo_id=REPO)


def test_without_the_package_push_to_hub_uploads_as_transformers_does(hub, model_folder, monkeypatch):
    monkeypatch.setattr(SelfContainedMixin, "push_saved_folder", None)
    BD3LMForMaskedLM.from_pretrained(model_folder).push_to_hub(REPO)
    files = hub.repos[REPO].files()
    assert {"model.safetensors", "modeling_bd3lm.py"} < files.keys() and "manifest.json" not in files


def test_an_adapter_names_the_repository_of_its_base(hub, bd3lm, model_folder, tmp_path):
    folder = make_adapter(model_folder, tmp_path / "adapter")
    assert_refused(bd3lm("push", folder, REPO), "--base-model")
    assert bd3lm("push", folder, REPO, "--base-model", "me/base")[0] == 0
    files = hub.repos[REPO].files()
    assert b'"base_model_name_or_path": "me/base"' in files["adapter_config.json"]
    assert str(model_folder).encode() not in b"".join(files.values()) and "model.safetensors" not in files


def test_a_folder_that_fails_the_check_is_not_uploaded(hub, bd3lm, run_folder, tmp_path, monkeypatch):
    def refuse(folder, model):
        raise CheckError("AutoModel computes something else")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    push(run_folder, REPO)
    monkeypatch.setitem(write_repository.__kwdefaults__, "check", refuse)
    code, out, err = bd3lm("push", run_folder, f"{USER}/other")
    assert (code, out, err) == (1, "", "error: AutoModel computes something else\n")
    assert bd3lm("push", run_folder, f"{USER}/other", "--dry-run", tmp_path / "new" / "out")[0] == 1
    assert f"{USER}/other" not in hub.repos and not any((tmp_path / "new").iterdir())
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("./nowhere", "model"), "owner/model"),
        (("./nowhere", "me/my model"), "'me/my model'"),
        (("./nowhere", "a/b/c"), "'a/b/c'"),
        (("./nowhere", REPO), "nowhere"),
        (("RUN", REPO, "--message", " "), "--message"),
        (("./nowhere", REPO, "--max-shard-size", "5GiB"), "'5GiB'"),
        (("RUN", REPO, "--weights", "ema"), "--weights ema"),
        (("RUN", REPO, "--base-model", "me/base"), "--base-model me/base"),
        (("RUN", REPO, "--token", "hf_secret12"), "HF_TOKEN"),
        (("RUN", REPO, "--tokne", "hf_secret12"), "--tokne"),
        (("RUN", REPO, "--hub-token=hf_secret12"), "--hub-token"),
    ],
)
def test_wrong_input_is_refused_in_one_line_without_secrets(hub, bd3lm, run_folder, arguments, part):
    code, out, err = bd3lm("push", *(run_folder if word == "RUN" else word for word in arguments))
    assert (code, out) == (2, "") and part in err and err.count("\n") == 1
    assert "secret12" not in err and not hub.repos


def test_without_a_login_nothing_is_written_but_a_dry_run_works(bd3lm, run_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-such-folder"))
    assert_refused(bd3lm("push", run_folder, REPO), "hf auth login")
    contents = dry_run(run_folder, REPO, tmp_path / "out", check=no_check)
    assert contents.sizes == {name: path.stat().st_size for name, path in files_of(tmp_path / "out").items()}
    assert all(is_allowed(name) for name in contents.sizes)


def test_a_missing_tokenizer_is_refused_unless_there_is_none(hub, bd3lm, model_folder):
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    assert_refused(bd3lm("push", model_folder, REPO), "--no-tokenizer")
    assert not hub.repos
    assert bd3lm("push", model_folder, REPO, "--no-tokenizer")[0] == 0
    assert "tokenizer.json" not in hub.repos[REPO].files()


@pytest.mark.parametrize("fault", [None, Fault("POST", "/commit/", 500)])
def test_a_token_appears_only_in_the_header(hub, bd3lm, run_folder, tmp_path, monkeypatch, caplog, fault):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub.faults += [fault] if fault else []
    for name in ("huggingface_hub", "transformers", "bd3lm_hf"):
        caplog.set_level(logging.DEBUG, logger=name)
    code, out, err = bd3lm("push", run_folder, REPO)
    assert code == (1 if fault else 0) and any("authorization" in request.headers for request in hub.requests)
    assert "preupload" in caplog.text  # the requests were logged
    assert TOKEN not in out + err + caplog.text and not hub.holds(TOKEN)
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
