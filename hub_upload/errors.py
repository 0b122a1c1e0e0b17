"""Errors between this machine and the Hub: one line each, with the remedy and without the token."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from bd3lm_hf.argument_parser import one_line


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
# If only the answer was lost, the commit exists.
_LATER = "try again later: a commit is all or nothing, and files that have arrived are not sent again"


class HubError(OSError):
    """The Hub or the network failed. Unless only the answer was lost, the repository is unchanged."""

    exit_code = 1  # the input was right


class CheckError(RuntimeError):
    """A folder does not load without bd3lm_hf as the model that it was saved from."""

    exit_code = 1


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
