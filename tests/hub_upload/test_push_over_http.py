"""What is pushed by the real client over a real connection is what a dry run shows, loads, and verifies."""

import pytest
from hub_server import TOKEN, USER, Fault
from huggingface_hub import ModelCard
from sharing import add_run, no_check

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.hub_upload import push as push_module
from bd3lm_hf.hub_upload.push import dry_run
from bd3lm_hf.hub_upload.repo_files import files_of


REPO = f"{USER}/my-model"


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """What is pushed here loads by itself, as other tests show."""
    monkeypatch.setitem(push_module.write_tree.__kwdefaults__, "check", no_check)


@pytest.fixture
def tree(model_folder, tmp_path):
    """What a push of `model_folder` brings to the hub."""
    dry_run(add_run(model_folder), REPO, tmp_path / "tree")
    return {name: path.read_bytes() for name, path in files_of(tmp_path / "tree").items()}


def held(hub, revision="main"):
    return {name: data for name, data in hub.repos[REPO].files(revision).items() if name != ".gitattributes"}


def test_a_push_brings_the_tree_in_one_commit_and_the_next_has_nothing_to_do(hub, bd3lm, model_folder, tree):
    code, out, err = bd3lm("push", model_folder, REPO, "--private", "--message", "Hello")
    assert code == 0 and TOKEN not in out + err
    assert held(hub) == tree and hub.repos[REPO].private and not hub.holds(TOKEN)
    assert len(hub.asked("POST", "/commit/")) == 1
    code, out, _ = bd3lm("push", model_folder, REPO)
    assert code == 0 and "nothing to do" in out
    assert len(hub.asked("POST", "/commit/")) == 1 and len(hub.asked("PUT", "/lfs/")) == 1


def test_a_pushed_model_loads_and_verifies_by_its_name(hub, bd3lm, model_folder, tree):
    assert bd3lm("push", model_folder, REPO)[0] == 0
    loaded = BD3LMForMaskedLM.from_pretrained(REPO)
    own = BD3LMForMaskedLM.from_pretrained(model_folder)
    assert all((a == b).all() for a, b in zip(loaded.state_dict().values(), own.state_dict().values(), strict=True))
    code, out, err = bd3lm("verify", REPO)
    assert code == 0 and "intact: " in out and TOKEN not in out + err
    code, _, err = bd3lm("verify", f"{USER}/nowhere")
    assert code == 2 and "no repository that you may read" in err
    code, _, err = bd3lm("verify", REPO, "--revision", "v9")
    assert code == 2 and f"{REPO} at v9" in err


def test_branches_and_pull_requests_leave_main_alone(hub, bd3lm, model_folder, tree):
    assert bd3lm("push", model_folder, REPO, "--revision", "v1")[0] == 0
    assert held(hub, "v1") == tree and held(hub) == {}
    code, out, _ = bd3lm("push", model_folder, REPO, "--create-pr")
    assert code == 0 and "/discussions/" in out and held(hub) == {}


def test_the_hubs_own_checker_accepts_the_card(hub, tree):
    card = ModelCard(tree["README.md"].decode())
    card.validate()
    assert len(hub.asked("POST", "/api/validate-yaml")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/commit/", status=503),
        Fault("POST", "/commit/", status=409),
        Fault("PUT", "/lfs/", cut=1000),
        Fault("POST", "/preupload/", status=403),
    ],
    ids=lambda fault: f"{fault.path}-{fault.status or 'cut'}",
)
def test_a_failed_push_leaves_the_repository_as_it_was_and_the_next_completes_it(
    hub, bd3lm, model_folder, tree, fault
):
    hub.faults.append(fault)
    code, out, err = bd3lm("push", model_folder, REPO)
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith(f"error: {REPO} can not be written: ")
    assert "Traceback" not in err and TOKEN not in err and held(hub) == {}
    sent = len([put for put in hub.asked("PUT", "/lfs/") if put.status == 200])
    hub.faults.clear()
    assert bd3lm("push", model_folder, REPO)[0] == 0
    assert held(hub) == tree
    assert len([put for put in hub.asked("PUT", "/lfs/") if put.status == 200]) == 1 >= sent


def test_save_pretrained_and_push_to_hub_bring_the_same_tree(hub, model_folder, tree):
    model = BD3LMForMaskedLM.from_pretrained(model_folder)
    model.save_pretrained(model_folder, push_to_hub=True, repo_id=REPO)
    assert held(hub) == tree
    assert model.push_to_hub(REPO, revision="v1").endswith(hub.repos[REPO].branches["v1"])
    assert held(hub, "v1").keys() == tree.keys()
