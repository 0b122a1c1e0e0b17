"""`bd3lm push DIR REPO`: a trained model becomes a repository on the hub that anyone can load.

1. Check everything that needs no network: the folder, the name, the login.
2. Write the tree: weights, code, configurations, tokenizer, and nothing else.
3. Have a process that knows nothing of bd3lm_hf load it, and compare.
4. Add the model card and the manifest.
5. Upload in one commit, or write the tree to a folder (`--dry-run`).
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from bd3lm_hf.hub_upload.card import make_card
from bd3lm_hf.hub_upload.errors import CheckError, HubError
from bd3lm_hf.hub_upload.load_check import check_alone
from bd3lm_hf.hub_upload.manifest import write_manifest
from bd3lm_hf.hub_upload.repo_files import (
    CARD_NAME,
    MAX_SHARD_SIZE,
    WEIGHTS,
    check_source,
    files_of,
    left_out,
    name_base,
    read_contents,
    write_contents,
)
from bd3lm_hf.hub_upload.upload import Upload, upload
from bd3lm_hf.run_folder import as_size, free_bytes, publish_folder, staging_folder


_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]I?B", re.IGNORECASE)
_MESSAGE = "Upload model"


class Tree(NamedTuple):
    """What is, or would be, in the repository."""

    card: str  # text of the model card
    sizes: dict[str, int]  # file -> bytes
    left_out: list[str]  # what else lies in the source
    notes: list[str]  # what was chosen


def write_tree(
    source: Path,
    target: Path,
    repo_id: str,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    tokenizer: bool = True,
    weights: str = "auto",
    base_model: str | None = None,
    check: Callable[[Path, Any], None] = check_alone,
    **card: Any,
) -> Tree:
    """Write the tree of a repository into a new folder.

    Args:
        source: folder of a run, a checkpoint, a converted model or an adapter.
        repo_id: `owner/name`, for the model card.
        max_shard_size: larger weights are split into files of at most this, such as "5GB".
        tokenizer: whether there has to be one.
        weights: see [`read_contents`].
        base_model: repository of an adapter's base, where the adapter names a folder.
        check: is called with the folder and the model in memory before the card and the manifest are written.
        card: see [`make_card`].

    Raises:
        ValueError: the folder can not be shared, see [`check_source`] and [`read_contents`].
        CheckError: what was written does not load by itself.
    """
    check_source(source, tokenizer=tokenizer, base_model=base_model)
    contents = read_contents(source, tokenizer=tokenizer, weights=weights)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in contents.model.state_dict().values())
    if (free := free_bytes(target)) < needed:
        raise ValueError(
            f"the tree takes about {as_size(needed)}, but only {as_size(free)} are free for {target}: make room, or "
            f"set TMPDIR to a folder on another disk."
        )
    write_contents(contents, source, target, max_shard_size=max_shard_size)
    check(target, contents.model)
    base = contents.base
    if base_model is not None:
        name_base(target, base_model)
        base = base_model
    words = contents.tokenizer is not None
    made = make_card(contents.model, source, repo_id, tokenizer=words, base=base, decay=contents.decay, **card)
    made.save(target / CARD_NAME)
    write_manifest(target)
    sizes = {name: path.stat().st_size for name, path in files_of(target).items()}
    return Tree(str(made), sizes, left_out(source, target), contents.notes)


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
) -> tuple[Any, Tree]:
    """Upload a model in one commit; what the repository holds already is not sent again.

    Args:
        source: as in [`write_tree`].
        repo_id: `owner/name`; created if it is not there.
        private: of a new repository.
        revision: branch, created if it is not there; by default "main".
        create_pr: open a pull request instead.
        message: of the commit.
        description: of the commit.
        api: client of the hub; by default with the token of the environment or the login.
        background: return as soon as the tree is written and checked.
        options: of [`write_tree`].

    Returns:
        The [`Upload`], with `background` a future of it, and the tree.

    Raises:
        ValueError: bad input, or nobody is logged in; found before any network access.
        CheckError: the tree does not load by itself.
        HubError: the hub or the network failed; the repository is as it was.
    """
    source = Path(source).expanduser()
    check_repo_id(repo_id)
    if message is not None and not message.strip():
        raise ValueError("--message is empty: say what changed, or leave it out.")
    api = api or HfApi()
    if not (api.token or get_token()):
        raise ValueError("nobody is logged in here: run `hf auth login`, or set HF_TOKEN.")
    with ExitStack() as stack:
        temporary = TemporaryDirectory(prefix="bd3lm-push-", ignore_cleanup_errors=True)
        stack.callback(temporary.cleanup)
        folder = Path(temporary.name) / "tree"
        tree = write_tree(source, folder, repo_id, **options)
        cleanup = stack.pop_all()  # by whoever uploads

    def send() -> Upload:
        with cleanup:
            place = {"private": private, "revision": revision, "create_pr": create_pr}
            how: dict[str, Any] = {**place, "message": message or _MESSAGE, "description": description}
            return upload(api, folder, repo_id, **how)

    return api.run_as_future(send) if background else send(), tree


def share(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    message: str | None = None,
    background: bool = False,
    **options: Any,
) -> Any:
    """[`push`] under the names of transformers, with the model card left in the folder.

    Returns:
        The address of what was uploaded; with `background` a future of the [`Upload`].
    """
    options |= {"message": message or commit_message, "description": commit_description, "tokenizer": False}
    done, tree = push(folder, repo_id, background=background, **options)
    (folder / CARD_NAME).write_text(tree.card, encoding="utf-8")
    return done if background else done.url


def dry_run(source: str | Path, repo_id: str, target: Path, **options: Any) -> Tree:
    """Write the exact tree that [`push`] would upload into `target`; it appears there when it is complete.

    Raises:
        ValueError: bad input, or a target that is in use.
        CheckError: the tree does not load by itself.
    """
    check_repo_id(repo_id)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--dry-run {target} is in use: name a folder that does not exist, or an empty one.")
    with _staged(target) as staged:
        return write_tree(Path(source).expanduser(), staged, repo_id, **options)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, or is removed after an error."""
    staged = staging_folder(target.absolute().parent) / f"{target.name}.tree"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        yield staged
        if target.exists():
            target.rmdir()  # empty, as was checked
        publish_folder(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if staged.parent.is_dir() and not any(staged.parent.iterdir()):
            staged.parent.rmdir()


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository with its owner.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"REPO {repo_id!r} is no name of a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"REPO {repo_id!r} has no owner: write owner/{repo_id}, with your name or an organization's.")


def _shard_size(text: str) -> str:
    if not _SIZE.fullmatch(text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB or 500MB")
    return text.strip()


def _no_token(text: str) -> str:
    # Were it unknown, argparse would show it.
    raise argparse.ArgumentTypeError("a token is not for the command line: set HF_TOKEN, or run `hf auth login`")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bd3lm push",
        description="Upload a model so that anyone can load it. The token comes from HF_TOKEN or `hf auth login`.",
    )
    parser.add_argument("source", metavar="DIR", help="folder of a run, a checkpoint, a converted model or an adapter")
    parser.add_argument("repo", metavar="REPO", help="owner/name on the hub")
    parser.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to write to, created if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry-run", type=Path, metavar="OUT", help="write the tree to this folder and upload nothing")
    parser.add_argument("--max-shard-size", type=_shard_size, default=MAX_SHARD_SIZE, help="split larger weights")
    parser.add_argument("--weights", default="auto", choices=WEIGHTS, help="of a checkpoint that has an average")
    parser.add_argument("--base-model", help="repository of an adapter's base model")
    parser.add_argument("--license", help="of the model, as the hub calls it, such as apache-2.0")
    parser.add_argument("--token", type=_no_token, help=argparse.SUPPRESS)
    parser.add_argument("--no-tokenizer", action="store_true", help="the model has no tokenizer")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run with the command line's arguments; exit code 2 for bad input, 1 where the check or the hub fails."""
    arguments = make_parser().parse_args(argv)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options = {name: getattr(arguments, name) for name in ("max_shard_size", "weights", "base_model", "license")}
    options["tokenizer"] = not arguments.no_tokenizer
    try:
        if arguments.dry_run is not None:
            tree = dry_run(arguments.source, arguments.repo, arguments.dry_run, **options)
            print(listing(tree))
            print(f"nothing was uploaded; the tree of {arguments.repo} is in {arguments.dry_run}")
            return
        place = {name: getattr(arguments, name) for name in ("private", "revision", "create_pr", "message")}
        done, tree = push(arguments.source, arguments.repo, **place, **options)
    except (CheckError, HubError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(listing(tree))
    print(summary(done, arguments.repo))


def listing(tree: Tree) -> str:
    """The files with their sizes, then what was left out and chosen."""
    width = max(map(len, tree.sizes))
    lines = [f"{name:<{width}}  {as_size(size):>12}" for name, size in tree.sizes.items()]
    lines.append(f"{f'{len(tree.sizes)} files':<{width}}  {as_size(sum(tree.sizes.values())):>12}")
    if tree.left_out:
        lines.append(f"left out: {', '.join(tree.left_out)}")
    return "\n".join([*lines, *(f"note: {note}" for note in tree.notes)])


def summary(done: Upload, repo_id: str) -> str:
    """What an upload did, in a line."""
    if not done.added and not done.removed:
        return f"nothing to do: {repo_id} holds these files already"
    removed = f", removed {', '.join(done.removed)}" if done.removed else ""
    return f"uploaded {len(done.added)} files{removed}: {done.url}"


__all__ = ["Tree", "check_repo_id", "dry_run", "listing", "main", "make_parser", "push", "summary", "write_tree"]
