"""`bd3lm serve MODEL`: an OpenAI-compatible server for one model, on this machine.

bd3lm serve bd3lm-demo
curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The method returns"}'

Endpoints: /v1/completions, /v1/chat/completions (models with a chat template), /v1/models, /health, /metrics.
"""

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from bd3lm_hf.console import integer, load_model_and_tokenizer
from bd3lm_hf.generation.generate_cli import CHOICES, FIELDS, generation_fields


_LIBRARIES = ("fastapi", "uvicorn", "openai", "transformers.cli.serving")
_KEY_VARIABLE = "BD3LM_API_KEY"
# Fields of `generate` that have a flag, besides `--sampler`.
_FIELDS = ("num_denoising_steps", "confidence_threshold", "entropy_bound", "nucleus_p", "temperature")


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm serve`."""
    parser.description, parser.formatter_class = __doc__, argparse.RawTextHelpFormatter
    parser.add_argument("model", help="checkpoint folder or Hub name")
    parser.set_defaults(tokenizer=None)  # the model's own
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; a public one needs an API key")
    parser.add_argument(
        "--port", type=integer(0, 2**16 - 1), default=8000, help="port to listen on; 0 picks a free one"
    )
    parser.add_argument(
        "--api-key",
        help=f"key that every request must carry; safer in the variable {_KEY_VARIABLE}, out of process lists",
    )
    parser.add_argument("--name", help="the model's name in requests; MODEL by default")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="auto: as saved"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the folder; ours needs none")
    limits = parser.add_argument_group("limits")
    count = integer(1)
    limits.add_argument("--max-batch-size", type=count, default=8, help="requests generated together")
    limits.add_argument(
        "--max-waiting", type=count, default=64, help="requests that may wait; further ones are answered with 429"
    )
    limits.add_argument("--max-tokens", type=count, default=256, help="new tokens for a request that sets no limit")
    fields = parser.add_argument_group("generation", "defaults for all requests; otherwise those saved with the model")
    samplers, text = CHOICES["sampler"]
    fields.add_argument("--sampler", choices=samplers, help=text)
    for name in _FIELDS:
        kind, text = FIELDS[name]
        fields.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Check the arguments, load the model and serve it until the process is stopped."""
    api_key = check(arguments)
    listener = listen(arguments.host, arguments.port)
    try:
        app = load_app(arguments, api_key)
        import uvicorn

        logging.getLogger("uvicorn.error").addFilter(
            lambda record: api_key is None or api_key not in record.getMessage()
        )
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        listener.listen(2048)  # a client may connect as soon as the line is printed
        print(f"Serving {arguments.name or arguments.model} at http://{host}:{port}/v1 (Ctrl-C stops)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        try:
            server.run(sockets=[listener])
        finally:  # `run` raises on Ctrl-C
            app.state.batcher.close()
    finally:
        listener.close()


def check(arguments: argparse.Namespace) -> str | None:
    """Check the libraries and the host before anything is loaded, and return the API key."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"bd3lm serve needs {', '.join(missing)}: run `pip install 'bd3lm-hf[serve]'`.")
    api_key = arguments.api_key or os.environ.get(_KEY_VARIABLE)
    if not _is_local(arguments.host) and not api_key:
        raise ValueError(
            f"--host {arguments.host} can be reached from other machines: use --host 127.0.0.1, or require a key with "
            f"{_KEY_VARIABLE} or --api-key."
        )
    return api_key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, so a port in use is reported before the model is loaded.

    Raises:
        OSError: if the port is in use or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror}. Choose another --port.") from error
    return listener


def load_app(arguments: argparse.Namespace, api_key: str | None) -> Any:
    """Load the model and return the application."""
    import torch

    from bd3lm_hf.checkpoints import check_generates
    from bd3lm_hf.serving.server import make_app

    if arguments.device == "auto":
        arguments.device = None
    model, tokenizer = load_model_and_tokenizer(arguments)
    check_generates(model, arguments.model)
    if arguments.dtype != "auto":
        model = model.to(getattr(torch, arguments.dtype))
    defaults = generation_fields(arguments)
    app = make_app(
        model,
        tokenizer,
        name=arguments.name or arguments.model,
        defaults=defaults,
        max_tokens=arguments.max_tokens,
        api_key=api_key,
        max_batch_size=arguments.max_batch_size,
        max_waiting=arguments.max_waiting,
    )
    # Generate one token, so a model or a flag that does not work is reported now and not at the first request.
    options = {"do_sample": True, **defaults}
    if getattr(model.generation_config, "num_denoising_steps", None):
        options["num_denoising_steps"] = 1  # an SSD-LM defaults to a thousand
    start = torch.full((1, 1), model.config.bos_token_id or 0, device=model.device)
    model.generate(start, max_new_tokens=1, **options)
    return app
