"""`bd3lm push DIR REPO`: upload a trained model to a Hub repository from which anyone can load it.

1. Check what needs no network: the folder, the repository name, the login.
2. Write the repository's files: weights, code, configurations, tokenizer, and nothing else.
3. Load them in a process that cannot import bd3lm_hf, and compare outputs.
4. Add the model card and the manifest.
5. Upload in one commit, or write to a folder (`--dry-run`).

`bd3lm verify DIR` hashes the files of a folder again, and names those that differ from its manifest.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

import bd3lm_hf
from bd3lm_hf.console import one_line, printable
from bd3lm_hf.data.sources import is_local
from bd3lm_hf.hub_upload.card import make_card
from bd3lm_hf.hub_upload.hub_cli import MAX_SHARD_SIZE
from bd3lm_hf.hub_upload.load_check import check_loads_alone
from bd3lm_hf.hub_upload.repo_files import (
    CARD_NAME,
    MANIFEST_NAME,
    ManifestDifference,
    check_source,
    compare_with_manifest,
    files_of,
    left_out,
    name_base,
    new_folder,
    read_contents,
    read_manifest,
    write_contents,
    write_manifest,
)
from bd3lm_hf.run_folder import as_size


_MESSAGE = "Upload model"
# Weights in another layout: transformers would load them instead of the new ones, or ignore them.
_OTHER_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*")

# The HTTP library's own base class; which library that is depends on the version of huggingface_hub.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_CHANGED = "the repository was changed in the meantime: push again"
_REMEDIES = {
    401: "the Hub rejected your token: log in with `hf auth login`, or set HF_TOKEN",
    403: "your token lacks this permission: log in with one that may write to this repository",
    404: "the repository or revision does not exist, or you may not see it: check its name, and log in",
    409: _CHANGED,
    412: _CHANGED,
    413: "the Hub does not accept files of this size: lower --max-shard-size",
    429: "too many requests: push again later",
}
# If only the response was lost, the commit exists.
_LATER = "try again later: a commit is all or nothing, and files that have arrived are not sent again"


class RepoContents(NamedTuple):
    """The files of a repository, as uploaded or as a dry run writes them."""

    card: str  # text of the model card
    sizes: dict[str, int]  # file -> bytes
    left_out: list[str]  # files of the source that are not uploaded
    notes: list[str]  # choices that were made


class Upload(NamedTuple):
    """The result of an upload."""

    url: str  # of the repository, the commit or the pull request
    changed: bool  # False if the repository already had these files
    removed: list[str]  # files of an earlier push that the model no longer has


# Write the repository's files


def write_repository(
    source: Path,
    target: Path,
    repo_id: str,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    tokenizer: bool = True,
    weights: str = "auto",
    base_model: str | None = None,
    check: Callable[[Path, Any], None] = check_loads_alone,
    **card: Any,
) -> RepoContents:
    """Write the files of a repository into a new folder.

    Args:
        source: folder of a run, a checkpoint, a converted model or an adapter.
        repo_id: `owner/name`, for the model card.
        max_shard_size: larger weights are split into files of at most this size, such as "5GB".
        tokenizer: whether a tokenizer is required.
        weights: see [`read_contents`].
        base_model: repository of an adapter's base, if the adapter names a folder.
        check: called with the folder and the model in memory before the card and the manifest are written.
        card: see [`make_card`].

    Raises:
        ValueError: if the folder cannot be shared, see [`check_source`] and [`read_contents`].
        CheckError: if the written files do not load without bd3lm_hf.
    """
    check_source(source, tokenizer=tokenizer, base_model=base_model)
    contents = read_contents(source, tokenizer=tokenizer, weights=weights)
    write_contents(contents, source, target, max_shard_size=max_shard_size)
    check(target, contents.model)
    if base_model is not None:
        name_base(target, base_model)
    card |= {"base": base_model or contents.base, "tokenizer": contents.tokenizer is not None, "decay": contents.decay}
    made = make_card(contents.model, source, repo_id, **card)
    made.save(target / CARD_NAME)
    write_manifest(target)
    sizes = {name: path.stat().st_size for name, path in files_of(target).items()}
    return RepoContents(str(made), sizes, left_out(source, target), contents.notes)


def dry_run(source: str | Path, repo_id: str, target: Path, **options: Any) -> RepoContents:
    """Write the exact files that [`push`] would upload to `target`; they appear only when all are complete.

    Raises:
        ValueError: if an argument is invalid, or the target is not empty.
        CheckError: if the written files do not load without bd3lm_hf.
    """
    check_repo_id(repo_id)
    with new_folder(target, "--dry-run") as folder:
        return write_repository(Path(source).expanduser(), folder, repo_id, **options)


# Upload


def push(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    description: str | None = None,
    api: HfApi | None = None,
    background: bool = False,
    **options: Any,
) -> tuple[Any, RepoContents]:
    """Upload a model in one commit; files that the repository already has are not sent again.

    Args:
        source: as in [`write_repository`].
        repo_id: `owner/name`; created if it does not exist.
        private: visibility of a new repository.
        revision: branch, created if it does not exist; "main" by default.
        create_pr: open a pull request instead.
        message: message of the commit.
        description: description of the commit.
        api: client of the Hub; by default with the token of the environment or the login.
        background: return as soon as the files are written and checked.
        options: passed to [`write_repository`].

    Returns:
        The [`Upload`], or with `background` a future of it, and the files.

    Raises:
        ValueError: if an argument is invalid or you are not logged in; checked before any network access.
        CheckError: if the written files do not load without bd3lm_hf.
        HubError: if the Hub or the network failed; the repository is unchanged.
    """
    # 1. Check
    check_repo_id(repo_id)
    if message is not None and not message.strip():
        raise ValueError("--message is empty: describe the change, or leave it out.")
    api = api or HfApi()
    if not (api.token or get_token()):
        raise ValueError("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.")
    with ExitStack() as stack:
        temporary = stack.enter_context(TemporaryDirectory(prefix="bd3lm-push-", ignore_cleanup_errors=True))
        folder = Path(temporary) / "repository"
        # 2.-4. Write and check
        contents = write_repository(Path(source).expanduser(), folder, repo_id, **options)
        cleanup = stack.pop_all()  # the upload may outlive this call

    # 5. Upload
    def send() -> Upload:
        with cleanup:
            target: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
            return upload(api, folder, repo_id, message=message or _MESSAGE, description=description, **target)

    return api.run_as_future(send) if background else send(), contents


def upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    description: str | None = None,
) -> Upload:
    """Bring a repository to the state of a folder in one commit; create it, and the branch, if they do not exist.

    Other files in the repository stay, except for weights that are not in the folder and code of an earlier push.

    Raises:
        HubError: if the Hub or the network failed, or somebody else changed the repository meanwhile. Nothing is
            committed then.
    """
    files = files_of(folder)  # of allowed kinds, which `write_contents` checked
    with hub_errors(f"Cannot write to {repo_id}"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        state = _state(api, repo_id, revision, create=not create_pr)
        present = {entry.rfilename for entry in state.siblings or ()}
        # Weights in another layout would be loaded instead of the new ones.
        removed = sorted(_outdated(api, repo_id, str(state.sha), present) - files.keys())
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in removed]
        # Not `upload_folder`, which makes several commits with hf_xet. This call drops unchanged files by itself, and
        # makes no commit if nothing is left.
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=state.sha,
        )
    changed = commit.oid != state.sha
    return Upload(str(commit.pr_url or commit.commit_url) if changed else str(url), changed, removed)


def _state(api: HfApi, repo_id: str, revision: str | None, *, create: bool) -> Any:
    """Return the Hub's description of a branch, which is created if it does not exist."""
    try:
        return api.repo_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if revision is None or revision.startswith("refs/") or not create:
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.repo_info(repo_id, revision=revision)


def _outdated(api: HfApi, repo_id: str, commit: str, present: set[str]) -> set[str]:
    """Return the files of a repository that a push replaces: weights in any layout, and code of an earlier push."""
    top = {name for name in present if "/" not in name}
    weights = {name for name in top if any(Path(name).match(pattern) for pattern in _OTHER_WEIGHTS)}
    if MANIFEST_NAME not in present:
        return weights
    path = Path(api.hf_hub_download(repo_id, MANIFEST_NAME, revision=commit))
    try:
        listed = read_manifest(path.parent)["files"]
    except ValueError:  # a foreign file of that name
        return weights
    return weights | {name for name in listed.keys() & present if name.endswith(".py")}


def push_saved_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    background: bool = False,
    **options: Any,
) -> Any:
    """Call [`push`] with the argument names of transformers, and write the model card into the folder.

    Args:
        folder: a saved model; its tokenizer is uploaded if there is one.
        token: by default that of the environment or the login.
        background: return a future as soon as the files are written and checked.

    Returns:
        The URL of the repository, the commit or the pull request; with `background` a future of the [`Upload`], which
        has it as `url`.
    """
    options |= {"message": commit_message, "description": commit_description, "tokenizer": False}
    done, contents = push(folder, repo_id, api=HfApi(token=token), background=background, **options)
    Path(folder, CARD_NAME).write_text(contents.card, encoding="utf-8")
    return done if background else done.url


# Errors


class HubError(OSError):
    """The Hub or the network failed. Unless only the response was lost, the repository is unchanged."""

    exit_code = 1  # the arguments were valid


@contextmanager
def hub_errors(failure: str) -> Iterator[None]:
    """Turn every failure of the Hub or the network into a [`HubError`].

    Args:
        failure: the operation that failed, for the message.
    """
    try:
        yield
    except HubError:
        raise
    except (_HTTP_ERROR, OSError, RuntimeError) as error:
        # The client raises RuntimeError for a file that could not be sent; its cause has the reason.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(reason, "response", None), "status_code", 0)
        if isinstance(reason, LocalTokenNotFoundError):
            status = 401
        remedy = _REMEDIES.get(status, _LATER)
        raise HubError(f"{failure}: {remedy}. ({type(reason).__name__}: {one_line(str(reason))})") from reason


# Command line


def check_repo_id(repo_id: str) -> None:
    """Refuse a repository name without an owner, or one that the Hub does not allow.

    Raises:
        ValueError: if the name is not `owner/name`.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"REPO {repo_id!r} is not a repository name: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"REPO {repo_id!r} has no owner: write owner/{repo_id}.")


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm push`."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options = {name: getattr(arguments, name) for name in ("max_shard_size", "weights", "base_model", "license")}
    options["tokenizer"] = not arguments.no_tokenizer
    if arguments.dry_run is not None:
        contents = dry_run(arguments.source, arguments.repo, arguments.dry_run, **options)
        outcome = f"nothing was uploaded; the files of {arguments.repo} are in {arguments.dry_run}"
    else:
        target = {name: getattr(arguments, name) for name in ("private", "revision", "create_pr", "message")}
        done, contents = push(arguments.source, arguments.repo, **target, **options)
        outcome = summary(done, arguments.repo)
    print(listing(contents), outcome, sep="\n")


def listing(contents: RepoContents) -> str:
    """Format the files with their sizes, then the files left out and the notes."""
    width = max(map(len, contents.sizes))
    lines = [f"{name:<{width}}  {as_size(size):>12}" for name, size in contents.sizes.items()]
    lines.append(f"{f'{len(contents.sizes)} files':<{width}}  {as_size(sum(contents.sizes.values())):>12}")
    if contents.left_out:
        lines.append(printable(f"left out: {', '.join(contents.left_out)}"))
    return "\n".join([*lines, *(f"note: {printable(note)}" for note in contents.notes)])


def summary(done: Upload, repo_id: str) -> str:
    """Describe the result of an upload in one line."""
    if not done.changed:
        return f"nothing to do: {repo_id} already has these files"
    removed = f", removed {', '.join(done.removed)}" if done.removed else ""
    return f"uploaded{removed}: {printable(done.url)}"


# Verify


def model_folder(name: str, revision: str | None = None) -> Path:
    """Return a local folder, or download a repository and return its folder.

    Raises:
        ValueError: if there is no such folder or repository.
        OSError, httpx.HTTPError: if the download failed.
    """
    if Path(name).expanduser().is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {name} is a local folder, which has no revisions.")
        return Path(name).expanduser()
    if is_local(name):
        raise ValueError(f"DIR {name}: there is no such folder.")
    try:
        return Path(snapshot_download(name, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        repository = name if revision is None else f"{name} at {revision}"
        raise ValueError(f"DIR {repository} is neither a local folder nor a repository that you may read.") from error


def verification_report(difference: ManifestDifference) -> str:
    """Format a difference, one line per file; names from the folder are escaped."""
    lines = [f"{kind}: {name}" for kind in ("missing", "changed", "extra") for name in getattr(difference, kind)]
    state = "intact" if difference.intact else "NOT INTACT"
    lines.append(f"{state}: {difference.num_files} files, written by bd3lm_hf {difference.version}")
    if difference.other_code:
        files = ", ".join(difference.other_code)
        lines.append(f"code: differs from bd3lm_hf {bd3lm_hf.__version__} in {files}; read it before you run it")
    else:
        lines.append(f"code: that of bd3lm_hf {bd3lm_hf.__version__}")
    return "\n".join(map(printable, lines))


def run_verify(arguments: argparse.Namespace) -> None:
    """Run `bd3lm verify`; exit with code 1 if the folder differs."""
    with hub_errors(f"Cannot download {arguments.folder}"):
        folder = model_folder(arguments.folder, arguments.revision)
    difference = compare_with_manifest(folder)
    print(verification_report(difference))
    if not difference.intact or (arguments.strict and difference.other_code):
        raise SystemExit(1)
