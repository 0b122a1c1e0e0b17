"""What can go wrong between here and the hub, each in one line that tells what to do and holds no token."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError


# The HTTP library's own base class; which library that is depends on the version of huggingface_hub.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_REMEDIES = {
    401: "the hub does not know your token: log in with `hf auth login`, or set HF_TOKEN",
    403: "your token may not do that: log in with one that may write to this repository",
    404: "there is no such repository or revision, or you may not see it: look at its name, and log in",
    409: "the repository was changed meanwhile: push again",
    412: "the repository was changed meanwhile: push again",
    413: "the hub does not take files of this size: lower --max-shard-size",
    429: "the hub asks for patience: push again later",
}
# Where only the answer was lost, the commit may stand.
_LATER = "try again later: a commit is made whole or not at all, and what has arrived is not sent again"


class HubError(OSError):
    """The hub, or the way to it, failed. Unless only the answer got lost, the repository is as it was."""


class CheckError(RuntimeError):
    """A folder does not load by itself as the model that it was made of."""


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn every failure of the hub or the network into a [`HubError`].

    Args:
        what: what does not work then, for the message.
    """
    try:
        yield
    except HubError:
        raise
    except (_HTTP_ERROR, OSError, RuntimeError) as error:
        # The client tells that a file could not be sent; why, the error before says.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(reason, "response", None), "status_code", 0)
        if isinstance(reason, LocalTokenNotFoundError):
            status = 401
        remedy = _REMEDIES.get(status, _LATER)
        raise HubError(f"{what}: {remedy}. ({type(reason).__name__}: {without_token(str(reason))})") from reason


def without_token(text: str) -> str:
    """A text in one line, in which the token of this machine, should it be there, is covered."""
    token = get_token()
    covered = text.replace(token, "***") if token else text
    return " ".join(covered.split())


__all__ = ["CheckError", "HubError", "hub_errors", "without_token"]
