"""What the tests of sharing share: a folder full of things that are nobody's business, and a hub in memory."""

import functools
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.checkpoints import add_adapters


SCORE = {
    "nll": 2.5,
    "perplexity": 12.182,
    "bits_per_token": 3.6,
    "bits_per_byte": 1.25,
    "standard_error": 0.01,
    "num_tokens": 1234,
    "num_sequences": 40,
    "seconds": 1.0,
}
JUNK = (".env", "optimizer.pt", "training_args.bin", "samples.txt", "notes.py", "runs/events.out", "ema.json")


def add_run(folder: Path, **recipe: Any) -> Path:
    """What a run leaves beside its model: recipe, results, weights.json, and files that must never be uploaded."""
    fields = {"dataset": "wikitext103", "learning_rate": 0.001, "ema_decay": 0.99, "final_estimator": "exact"}
    (folder / "recipe.yaml").write_text(json.dumps({**fields, "output_dir": "secret-place", **recipe}))
    results = {"before": None, "after": SCORE, "steps": 7, "seed": 3, "versions": {"torch": "2.13"}}
    (folder / "results.json").write_text(json.dumps({**results, "unigram_perplexity": 99.5}))
    (folder / "weights.json").write_text(json.dumps({"weights": "average", "step": 7, "ema_decay": 0.99}))
    for name in JUNK:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("HF_TOKEN=hf_secret")
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes something, on the model of a folder, with the same tokenizer."""
    adapted = add_adapters(BD3LMForMaskedLM.from_pretrained(base), rank=2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(folder)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def no_check(folder: Path, model: Any) -> None:
    """In place of the isolated process, where a test is about something else."""


def hub_failure(status: int, text: str, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """What the client of the hub raises when a server answers so."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(text, response=response)


def as_the_client_does(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `MemoryHub` that takes only what the method of that name of `HfApi` takes."""
    signature = inspect.signature(getattr(HfApi, method.__name__))

    @functools.wraps(method)
    def checked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        signature.bind(self, *arguments, **keywords)
        return method(self, *arguments, **keywords)

    return checked


class MemoryHub:
    """A stand-in for `HfApi` that keeps repositories as dictionaries and counts its commits."""

    def __init__(self, token: str | None = "hf_secret") -> None:
        self.token = token
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool | None] = {}
        self.commits: list[SimpleNamespace] = []
        self.fail: Exception | None = None  # raised by the next commit
        self.folder: Path | None = None  # for downloads

    @as_the_client_does
    def create_repo(
        self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False, token: Any = None
    ) -> Any:
        assert exist_ok
        if repo_id not in self.repos:
            self.repos[repo_id] = {"main": {".gitattributes": b"*.safetensors filter=lfs"}}
            self.private[repo_id] = private
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    @staticmethod
    def no_card(repo_id: str, **options: Any) -> Any:
        """In place of `ModelCard.load`: there is none yet."""
        raise EntryNotFoundError(repo_id)

    @as_the_client_does
    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        self.repos[repo_id].setdefault(branch, dict(self.repos[repo_id]["main"]))

    @as_the_client_does
    def repo_info(self, repo_id: str, *, revision: str | None = None, files_metadata: bool = False) -> Any:
        assert files_metadata
        branch = self.repos[repo_id].get(revision or "main")
        if branch is None:
            raise hub_failure(404, "no such revision", RevisionNotFoundError)
        siblings = [self._sibling(name, content) for name, content in branch.items()]
        return SimpleNamespace(sha=f"{len(self.commits):040x}", siblings=siblings)

    @staticmethod
    def _sibling(name: str, content: bytes) -> Any:
        digest = hashlib.sha256(content).hexdigest()
        lfs = BlobLfsInfo(len(content), digest, 130) if name.endswith(".safetensors") else None
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return RepoSibling(name, size=len(content), blob_id=blob, lfs=lfs)

    @as_the_client_does
    def hf_hub_download(self, repo_id: str, name: str, *, revision: str) -> str:
        assert self.folder is not None and revision == f"{len(self.commits):040x}"
        (self.folder / "download").write_bytes(self.repos[repo_id]["main"][name])
        return str(self.folder / "download")

    @as_the_client_does
    def create_commit(self, repo_id: str, operations: list[Any], **how: Any) -> Any:
        assert how.pop("parent_commit", None) in (None, f"{len(self.commits):040x}")
        if self.fail is not None:
            raise self.fail
        self.commits.append(SimpleNamespace(repo_id=repo_id, operations=operations, **how))
        files = dict(self.repos[repo_id][how["revision"] or "main"])
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
            else:
                del files[operation.path_in_repo]
        self.repos[repo_id]["refs/pr/1" if how["create_pr"] else how["revision"] or "main"] = files
        pr_url = f"https://hub/{repo_id}/discussions/1" if how["create_pr"] else None
        return SimpleNamespace(pr_url=pr_url, commit_url=f"https://hub/{repo_id}/commit/1")

    def run_as_future(self, work: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future
