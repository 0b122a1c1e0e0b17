"""Measure what a server gains from batching: tokens per second of one client and of several at once.

python tests/serving/throughput.py --layers 4 --width 256 --new-tokens 64

The server is `bd3lm serve` in a process of its own, with random weights. Every client sends one request after the
other. One client and several send the same eight prompts of unequal length, as reading a prompt takes time too. The
counts of clients are measured in turn, and the ratio is that of the medians.
"""

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_PROMPTS = 8  # of unequal length
_CLIENTS, _REQUESTS = (1, 8), 2


def write_model(folder: Path, layers: int, width: int) -> None:
    """Write a BD3-LM with random weights and the tokenizer of the tests."""
    import torch
    from conftest import make_tiny_tokenizer, train_tiny_tokenizer

    from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM

    tokenizer = make_tiny_tokenizer(train_tiny_tokenizer())
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "mask")}
    sizes = {"vocab_size": 8192, "hidden_dim": width, "n_blocks": layers, "n_heads": width // 64, "cond_dim": 64}
    config = BD3LMConfig(**sizes, **ids, model_length=1024, block_size=4, eos_token_id=None)
    BD3LMForMaskedLM(config).save_pretrained(folder)


class Server:
    """`bd3lm serve` in a separate process.

    Args:
        stderr: file for its messages; none by default.
        port: 0 takes a free one.
    """

    def __init__(self, folder: str, stderr: Any = subprocess.DEVNULL, port: int = 0) -> None:
        command = [sys.executable, "-m", "bd3lm_hf.cli", "serve", folder, "--port", str(port), "--name", "model"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        if found is None:
            raise SystemExit(f"bd3lm serve did not start: {line!r}")
        self.port = int(found[1])

    def complete(self, prompt: str, count: int, seed: int) -> int:
        """Return the number of tokens of one answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = json.dumps({"prompt": prompt, "max_tokens": count, "seed": seed})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return int(answer["usage"]["completion_tokens"])

    def tokens_per_second(self, clients: int, new_tokens: int) -> float:
        def run(number: int) -> int:
            return self.complete("The quick brown fox. " * (1 + number % _PROMPTS), new_tokens, number)

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(run, range(max(_PROMPTS, clients * _REQUESTS))))
        return tokens / (time.perf_counter() - started)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 8), ("width", 512), ("new-tokens", 96), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.layers, arguments.width)
        server = Server(folder)
        try:
            server.tokens_per_second(1, 16)  # warm up
            speeds: dict[int, list[float]] = {clients: [] for clients in _CLIENTS}
            for _ in range(arguments.repeats):
                for clients, found in speeds.items():
                    found.append(server.tokens_per_second(clients, arguments.new_tokens))
        finally:
            server.close()
    base = statistics.median(speeds[1])
    for clients, found in speeds.items():
        middle = statistics.median(found)
        spread = ", ".join(f"{speed:.1f}" for speed in sorted(found))
        print(f"{clients} clients: {middle:.1f} tokens/s ({spread}), {middle / base:.2f} times 1")


if __name__ == "__main__":
    main()
