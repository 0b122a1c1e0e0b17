"""The tiny configuration, tokenizer and model that all tests share, in a run that touches nothing outside itself."""

import gc
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace


# Set before transformers is imported: nothing is fetched, and code and data caches live as long as this run.
_CACHE = tempfile.TemporaryDirectory(prefix="bd3lm-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _CACHE.name
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
}.items():
    os.environ.setdefault(_name, _value)

import pytest
import torch
from filelock import FileLock
from published import load_recorded
from shared_models import TINY, randomized, special_ids, tiny_bd3lm, tiny_gpt2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


# Models this small gain nothing from a second thread, and wait long for it on a busy machine.
torch.set_num_threads(1)

# A shell lets its background jobs, and so the processes that they start, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Trainers collect garbage often, and would examine everything that was imported each time.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    set_seed(0)  # for fixtures


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    set_seed(0)  # so that a test draws the same numbers alone, among others and in any worker


SENTENCES = (
    "A block is written from noise, token by token, and then it is never touched again.",
    "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on.",
    "Every masked token is revealed once; every revealed token stays as it is.",
    "Numbers such as 0, 1, 2, 345 and 6789 are text too, and so is naïve café prose.",
)
SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}


@pytest.fixture(scope="module")
def recorded(request) -> dict[str, torch.Tensor]:
    """Outputs of the published code, from the golden folder that the test file names as RECORDED."""
    return load_recorded(request.module.RECORDED)


@pytest.fixture
def tiny_config() -> BD3LMConfig:
    """Two layers, two heads, blocks of 4 in a window of 32, 48 ids; bos 0, eos 1, pad 2, mask 47; no dropout."""
    return BD3LMConfig(**TINY)


@pytest.fixture
def randomize():
    """A function `(model, seed=0, std=0.1) -> model` that fills every parameter with seeded normal numbers."""
    return randomized


@pytest.fixture
def tiny_model(tiny_config, randomize):
    """A `BD3LMForMaskedLM` of `tiny_config` in evaluation mode, with informative seeded weights."""
    return randomize(BD3LMForMaskedLM(tiny_config)).eval()


@pytest.fixture
def interpreted():
    """Flex attention without its kernel, whose compilation takes seconds for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def fresh_compiler():
    """Code compiled by other tests is neither used nor counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_model():
    """A function `(**config fields) -> model` whose greedy text varies; it has no end token, so it never stops."""
    from generating import make_family

    return lambda **fields: make_family("bd3lm", seed=0, **{"model_length": 32, **fields}).float()


def train_tiny_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def _tiny_tokenizer_json() -> str:
    return train_tiny_tokenizer()


def make_tiny_tokenizer(tokenizer_json: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        clean_up_tokenization_spaces=False,
        model_max_length=32,
        **SPECIAL_TOKENS,
    )


@pytest.fixture
def tiny_tokenizer(_tiny_tokenizer_json) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 ids, so any text survives encode and decode; bos 0, eos 1, pad 2, mask 3.

    Its vocabulary is larger than that of `tiny_config`: a model that reads its text needs `vocab_size=len(tokenizer)`
    and `mask_token_id=tokenizer.mask_token_id`.
    """
    return make_tiny_tokenizer(_tiny_tokenizer_json)


@pytest.fixture
def model_folder(tiny_tokenizer, tmp_path) -> Path:
    """A checkpoint of a model that reads and writes the text of the tiny tokenizer."""
    model = tiny_bd3lm(vocab_size=len(tiny_tokenizer), **special_ids(tiny_tokenizer))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gpt2_folder(tiny_tokenizer, tmp_path) -> Path:
    """A stock model of transformers with the tiny tokenizer."""
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def make_trainer(tiny_config, randomize, tmp_path):
    """A function that makes a trainer of the same tiny random model on the same 16 sequences."""
    from tiny_runs import rows_of

    from bd3lm_hf.training.arguments import BD3LMTrainingArguments
    from bd3lm_hf.training.trainer import BD3LMTrainer

    def make(model=None, rows=None, keywords=None, **arguments):
        defaults = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 8, "seed": 5}
        defaults |= {"learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"}
        defaults |= {"disable_tqdm": True, "use_cpu": True}
        return BD3LMTrainer(
            model=model or randomize(BD3LMForMaskedLM(tiny_config)),
            args=BD3LMTrainingArguments(**{**defaults, **arguments}),
            train_dataset=rows_of(16) if rows is None else rows,
            eval_dataset=rows_of(6, seed=1),
            **(keywords or {}),
        )

    return make


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, line by line.\n" * 60, encoding="utf-8")
    return path


@pytest.fixture
def bd3lm(capsys):
    """A function `(*arguments) -> (exit code, stdout, stderr)` that restores the verbosity of the libraries."""
    import datasets

    from bd3lm_hf import cli

    verbosity = logging.get_verbosity()

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def browser(tmp_path):
    """A function `(address) -> (page, messages)` that renders a page in Chromium, as text."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", "--dump-dom"]

    def run(address: str) -> tuple[str, str]:
        done = subprocess.run([program, *options, address], capture_output=True, timeout=120, check=True)
        return done.stdout.decode(), done.stderr.decode()

    return run


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Run `two_processes.py` once. Return its folder, and the results of each process."""
    from two_processes import results_of, run_two_processes

    folder = tmp_path_factory.getbasetemp() / "two-processes"
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share one run: the first one starts it
        folder = folder.parent.parent / folder.name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_two_processes(folder)
    return folder, results_of(folder)


@pytest.fixture
def no_load_check(monkeypatch):
    """Skip the check of a push in a separate process: it takes seconds, and has its own tests."""
    from bd3lm_hf.hub_upload.push import write_repository

    monkeypatch.setitem(write_repository.__kwdefaults__, "check", lambda folder, model: None)


@pytest.fixture
def hub(monkeypatch, tmp_path, no_load_check):
    """A Hub on this machine, see `hub_server.py`, that the client in this process uses without ever waiting."""
    import huggingface_hub.utils._http
    from hub_server import HubServer
    from huggingface_hub import constants

    home = tmp_path / "hub-home"
    with HubServer() as server:
        for name, value in server.environment(home).items():
            monkeypatch.setenv(name, value)
        # The library read its environment when it was imported.
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        clock = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
        monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers another hub
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
