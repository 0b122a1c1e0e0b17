"""A Trainer with `push_to_hub` uploads what `bd3lm push` does, and never a token or a pickle."""

import logging
import queue
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from hub_server import TOKEN, USER, Fault
from shared_models import special_ids, tiny_bd3lm
from tiny_runs import save_recipe
from transformers.utils.hub import PushInProgress

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.checkpoints import add_adapters
from bd3lm_hf.hub_upload import repo_files
from bd3lm_hf.hub_upload.push import dry_run
from bd3lm_hf.hub_upload.repo_files import files_of
from bd3lm_hf.training import train, uploads


REPO = f"{USER}/model"
EXAMPLES = [{"input_ids": list(range(4, 20)), "labels": list(range(4, 20))} for _ in range(4)]


@pytest.fixture
def uploading_trainer(make_trainer, tiny_tokenizer):
    def make(adapt=None, **options):
        model = tiny_bd3lm(vocab_size=len(tiny_tokenizer), **special_ids(tiny_tokenizer))
        options = {"max_steps": 1, "push_to_hub": True, "hub_model_id": REPO, **options}
        keywords = {"processing_class": tiny_tokenizer}
        return make_trainer(adapt(model) if adapt else model, EXAMPLES, keywords, **options)

    return make


def files_of_a_push(folder, target):
    dry_run(folder, REPO, target, check=lambda folder, model: None)
    return {name: path.read_bytes() for name, path in files_of(target).items()}


def messages(hub):
    return [commit["summary"] for commit in hub.commits(REPO)]


def test_a_saved_model_is_uploaded_as_push_would_upload_its_folder(hub, uploading_trainer, tmp_path):
    trainer = uploading_trainer(hub_private_repo=True, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    files = hub.repos[REPO].files()
    assert files == files_of_a_push(tmp_path / "run", tmp_path / "expected")
    assert hub.repos[REPO].private and messages(hub)[-1] == "Model save"
    assert (tmp_path / "run" / "training_args.bin").is_file() and "training_args.bin" not in files
    assert (tmp_path / "run" / "README.md").read_bytes() == files["README.md"]


def test_push_to_hub_saves_and_uploads_with_its_own_message_and_metadata(hub, uploading_trainer, tmp_path):
    trainer = uploading_trainer(push_to_hub=False)
    address = trainer.push_to_hub("Done", license="mit", tags="mine", revision="v1")
    assert "/commit/" in address and messages(hub) == ["Done"]
    card = hub.repos[REPO].files("v1")["README.md"].decode()
    assert "license: mit" in card and "- mine\n" in card and "token_nll" in card
    assert trainer.push_to_hub(blocking=False).result().url.startswith(hub.endpoint)


def test_checkpoints_are_uploaded_in_the_background_with_their_averaged_weights(hub, uploading_trainer, tmp_path):
    trainer = uploading_trainer(save_strategy="steps", save_steps=1, ema_decay=0.5, learning_rate=0.1, warmup_steps=0)
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    assert messages(hub) == ["Training in progress, step 1"]
    files = files_of_a_push(tmp_path / "run" / "checkpoint-1", tmp_path / "expected")
    assert hub.repos[REPO].files() == files
    assert not any("optimizer" in name or name.endswith(".bin") for name in files)
    assert files["model.safetensors"] != (tmp_path / "run/checkpoint-1/model.safetensors").read_bytes()


def test_at_the_end_only_means_no_upload_of_checkpoints(hub, uploading_trainer):
    uploading_trainer(save_strategy="steps", save_steps=1, hub_strategy="end").train()
    assert not hub.commits(REPO)


def test_a_checkpoint_is_skipped_while_an_upload_is_in_progress(hub, uploading_trainer, tmp_path):
    trainer = uploading_trainer()
    trainer.write_model(tmp_path / "run")
    trainer.push_in_progress = PushInProgress([SimpleNamespace(done=lambda: False)])
    trainer._push_from_checkpoint(str(tmp_path / "run"))
    assert not hub.commits(REPO)
    trainer.args.hub_always_push = True
    trainer._push_from_checkpoint(str(tmp_path / "run"))
    assert len(trainer.push_in_progress.jobs) == 2
    assert trainer.push_in_progress.jobs[1].result().changed and len(hub.commits(REPO)) == 1


def test_a_run_survives_a_hub_that_fails_but_its_last_upload_must_succeed(hub, uploading_trainer, monkeypatch):
    warnings: queue.Queue[str] = queue.Queue()  # the thread of an upload warns once its job has ended
    monkeypatch.setattr(uploads.logger, "warning", warnings.put)
    hub.faults.append(Fault("POST", "/commit/", 503))
    trainer = uploading_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.push_in_progress.jobs[0].exception() is not None
    warning = warnings.get(timeout=30)
    assert "an upload in the background failed" in warning and REPO in warning
    with pytest.raises(OSError, match=REPO):
        trainer.save_model()
    monkeypatch.setattr(uploads, "push_saved_folder", Mock(side_effect=RuntimeError("no")))
    uploading_trainer(save_strategy="steps", save_steps=1, overwrite_output_dir=True).train()
    assert "checkpoint-1 was not uploaded: no" in warnings.get(timeout=30)


def test_an_adapter_is_uploaded_as_one_if_its_base_has_a_repository(hub, uploading_trainer, monkeypatch, model_folder):
    def adapt(model):
        return add_adapters(BD3LMForMaskedLM.from_pretrained(model_folder), rank=2)

    def adapt_shared(model):
        adapted = adapt(model)
        adapted.peft_config["default"].base_model_name_or_path = "me/base"
        return adapted

    with pytest.raises(ValueError, match="--push_to_hub: .* --base-model"):
        uploading_trainer(adapt)
    assert not hub.repos
    monkeypatch.setattr(repo_files, "load_model", lambda *a, **k: BD3LMForMaskedLM.from_pretrained(model_folder))
    uploading_trainer(adapt_shared).save_model()
    files = hub.repos[REPO].files()
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    card = files["README.md"].decode()
    assert "library_name: peft" in card and "base_model: me/base" in card


@pytest.mark.parametrize(
    ("name", "value"),
    [("hub_token", "hf_secret"), ("hub_strategy", "checkpoint"), ("hub_strategy", "all_checkpoints")],
)
def test_tokens_as_arguments_and_uploads_of_whole_checkpoints_are_refused(uploading_trainer, name, value):
    with pytest.raises(ValueError, match=f"--{name}") as caught:
        uploading_trainer(**{name: value})
    assert (value in str(caught.value)) is (name == "hub_strategy")


def test_a_run_ends_with_an_upload_of_its_results(hub, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    hub_fields = {"push_to_hub": True, "hub_model_id": REPO}
    recipe = save_recipe(tmp_path, max_steps=1, output_dir=str(tmp_path / "run"), use_cpu=True, **hub_fields)
    train.run([str(recipe)])
    assert messages(hub)[-1] == "End of training"
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "after training" in card and "text.jsonl" in card and str(tmp_path) not in card
    assert TOKEN not in caplog.text
    for path in Path(tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
