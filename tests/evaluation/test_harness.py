"""The adapter to the lm-evaluation-harness: its numbers are those of token_nll, from Python and the command line."""

import functools
import importlib
import json
import math
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from generating import make_family
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from shared_models import special_ids
from test_cli import assert_refused

import bd3lm_hf
from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.evaluation.eval_cli import run_harness
from bd3lm_hf.evaluation.harness import BD3LMHarness, RequestWindow, generation_request, request_windows


DOCUMENTS = [
    {"question": "The quick brown fox ", "choices": ["jumps over", "sleeps on"], "answer": 0},
    {"question": "A block is", "choices": [" written", " a lazy dog", " never touched again"], "answer": 2},
]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[0]}}, and the lazy dog sleeps on and on, token by token.",
        "metric_list": [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    },
    "tiny_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture
def task_folder(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))  # JSON is YAML
    return folder


@pytest.fixture
def adapter(model_folder):
    """A function `(**arguments) -> BD3LMHarness` of the tiny checkpoint."""
    return lambda **arguments: BD3LMHarness(str(model_folder), device="cpu", **arguments)


def of_family(family, tokenizer, **fields):
    fields |= {"vocab_size": len(tokenizer), "model_length": 32, **special_ids(tokenizer)}
    return make_family(family, **fields).float()


def asked(kind, *arguments, doc=None, index=0):
    return Instance(kind, {}, arguments, index, (None if doc is None else "task", doc, 1))


def score(lm, *pairs, doc=None):
    return lm.loglikelihood([asked("loglikelihood", *pair, doc=doc) for pair in pairs], disable_tqdm=True)


# --- through the harness ---------------------------------------------------------------------------------------------


def test_tasks_run_through_the_harness_with_the_numbers_of_token_nll(model_folder, task_folder, tiny_tokenizer):
    results = lm_eval.simple_evaluate(
        model="bd3lm",
        model_args={"pretrained": str(model_folder), "device": "cpu"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    model = load_model(str(model_folder)).eval()
    correct = 0
    for row, document in zip(results["samples"]["tiny_choice"], DOCUMENTS, strict=True):
        expected = []
        for choice in document["choices"]:
            ids = tiny_tokenizer(document["question"] + choice)["input_ids"]
            labels = [-100] * len(tiny_tokenizer(document["question"].rstrip())["input_ids"])  # a space is not given
            labels += ids[len(labels) :]
            nll = model.token_nll(torch.tensor([ids]), labels=torch.tensor([labels]), estimator="exact").nll
            expected.append(-nll.sum().item())
        assert [float(pair[0]) for (pair,) in row["resps"]] == pytest.approx(expected, rel=1e-5)
        correct += max(range(len(expected)), key=expected.__getitem__) == document["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == correct / len(DOCUMENTS)
    total = bytes_in_all = 0.0
    for document in DOCUMENTS:
        text = f"{document['question']}{document['choices'][0]}, and the lazy dog sleeps on and on, token by token."
        for window in request_windows([0], tiny_tokenizer(text)["input_ids"], 32):
            labels = [-100] * window.num_context + window.ids[window.num_context :]
            ids = torch.tensor([window.ids])
            total += model.token_nll(ids, labels=torch.tensor([labels]), estimator="exact").nll.sum()
        bytes_in_all += len(text.encode())
    found = results["results"]["tiny_rolling"]["byte_perplexity,none"]
    assert found == pytest.approx(math.exp(total / bytes_in_all), rel=1e-5)
    for row, document in zip(results["samples"]["tiny_writing"], DOCUMENTS, strict=True):
        ids = torch.tensor([tiny_tokenizer(document["question"])["input_ids"]])
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["resps"] == [[tiny_tokenizer.decode(written, skip_special_tokens=True).partition("q")[0]]]
    assert results["config"]["estimator"] == "auto" and results["config"]["num_samples"] == 8
    assert results["config"]["model_class"] == "BD3LMForMaskedLM"


@pytest.fixture
def quick_start(monkeypatch):
    """The harness without its own ten thousand tasks, which take half a minute to index."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


def command_line(model_folder, task_folder, output) -> list[str]:
    arguments = ["harness", "--model_args", f"pretrained={model_folder},num_samples=4", "--tasks", "tiny_choice"]
    return [*arguments, "--device", "cpu", "--include_path", str(task_folder), "--output_path", str(output)]


def test_the_command_evaluates(bd3lm, quick_start, model_folder, task_folder, tmp_path):
    code, out, err = bd3lm(*command_line(model_folder, task_folder, tmp_path / "results.json"))
    assert code == 0, err
    assert "bd3lm ({'pretrained'" in out and "|tiny_choice|" in out.replace(" ", "")
    (written,) = tmp_path.glob("results*.json")
    results = json.loads(written.read_text())
    assert results["results"]["tiny_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results["config"]["num_samples"] == 4 and results["config"]["estimator"] == "auto"


def test_the_command_adds_our_model_if_none_is_named(monkeypatch):
    found = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: found.append(sys.argv))
    before = list(sys.argv)
    ours, model = [["--tasks", "a", "--num-fewshot=2"], ["run", "--tasks", "a"]], ["--model", "bd3lm"]
    others = [["--model", "hf"], ["ls", "tasks"], ["run", "-h"]]
    for words in (*ours, *others):
        run_harness(words)
    expected = [["--tasks", "a", "--num_fewshot=2", *model], ["run", "--tasks", "a", *model], *others]
    assert found == [["lm_eval", *words] for words in expected]
    assert sys.argv == before
    assert get_model("bd3lm") is BD3LMHarness and get_model("dummy").__name__ == "DummyLM"  # it keeps its own


def test_bad_input_of_the_command_is_one_line(bd3lm, quick_start, task_folder):
    place = ("--tasks", "tiny_choice", "--include_path", task_folder)
    code, _, err = bd3lm("harness", "--model_args", "pretrained=./nowhere", *place)
    assert code == 2 and err.rstrip().splitlines()[-1].startswith("error: pretrained ./nowhere: there is no such")


def test_without_the_harness_the_package_works_and_the_adapter_says_what_to_install(monkeypatch, bd3lm):
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "bd3lm_hf.evaluation.harness")
    monkeypatch.delattr(bd3lm_hf.evaluation, "harness")
    with pytest.raises(ImportError, match=r"the lm-evaluation-harness is needed: pip install 'bd3lm-hf\[harness\]'"):
        importlib.import_module("bd3lm_hf.evaluation.harness")
    assert_refused(bd3lm("harness", "--tasks", "a"), "pip install 'bd3lm-hf[harness]'")


# --- likelihoods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"estimator": "stratified", "num_samples": 3}])
def test_results_do_not_depend_on_the_batch(adapter, arguments):
    pairs = [(d["question"], choice) for d in DOCUMENTS for choice in d["choices"]] + [("", "A block"), ("  ", "x")]
    texts = [(d["question"] + " and the lazy dog sleeps on " * 3,) for d in DOCUMENTS]
    rolling, results = [], []
    for size in (1, 3, 64):
        lm = adapter(batch_size=size, **arguments)
        results.append(score(lm, *pairs))
        rolling.append(lm.loglikelihood_rolling([asked("loglikelihood_rolling", *text) for text in texts], True))
    for other in range(1, 3):
        assert [x for x, _ in results[other]] == pytest.approx([x for x, _ in results[0]], rel=1e-5)
        assert [greedy for _, greedy in results[other]] == [greedy for _, greedy in results[0]]
        assert rolling[other] == pytest.approx(rolling[0], rel=1e-5)


def test_the_choices_of_a_question_share_their_noise(adapter):
    lm = adapter(estimator="stratified", num_samples=2, check_greedy=False, batch_size=200)
    same, again = (score(lm, ("A block is", " written"), doc=3)[0][0] for _ in range(2))
    assert same == again != score(lm, ("A block is", " written"), doc=4)[0][0]
    # Differences between choices vary less over questions if the choices share their noise.
    first, second = ("The dog", " sleeps on and on"), ("The dog", " sleeps on and, and")
    numbers = range(60)
    wanted = [(first, doc) for doc in numbers] + [(second, doc) for doc in numbers]
    wanted += [(second, 1000 + doc) for doc in numbers]
    found = lm.loglikelihood([asked("loglikelihood", *pair, doc=doc) for pair, doc in wanted], disable_tqdm=True)
    ones, twos, others = torch.tensor([value for value, _ in found]).view(3, -1)
    assert (ones - twos).std() < 0.7 * (ones - others).std()
    (one, _), (two, _) = score(adapter(check_greedy=False), first, second)
    assert abs((ones - twos).mean().item() - (one - two)) < 5 * (ones - twos).std().item() / math.sqrt(60)


def test_the_sum_is_exact_if_it_takes_few_forward_passes(tiny_tokenizer):
    model = of_family("bd3lm", tiny_tokenizer, block_size=16)
    lm = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu")
    assert lm.estimator_of(RequestWindow(list(range(20)), 4)) == "stratified"
    assert lm.estimator_of(RequestWindow(list(range(24)), 8)) == "exact"  # eight in each of two blocks
    assert lm.estimator_of(RequestWindow(list(range(12)), 4)) == "exact"
    ((few, _),) = score(lm, ("A block is written from noise", " and"))
    estimate = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu", estimator="stratified", num_samples=500)
    assert few == pytest.approx(score(estimate, ("A block is written from noise", " and"))[0][0], rel=0.02)


def test_an_autoregressive_model_is_exact_and_a_time_conditioned_one_is_sampled(tiny_tokenizer):
    model = of_family("ar", tiny_tokenizer)
    lm = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu")
    window = RequestWindow(list(range(30)), 1)
    assert lm.estimator_of(window) == "exact"
    ((found, _),) = score(lm, ("The lazy", " dog"))
    context, continuation = (tiny_tokenizer(text)["input_ids"] for text in ("The lazy", " dog"))
    nll = model.token_nll(torch.tensor([context + continuation])).nll[0, len(context) :]
    assert found == pytest.approx(-nll.sum().item(), rel=1e-5)
    lm = BD3LMHarness(of_family("sedd", tiny_tokenizer), tokenizer=tiny_tokenizer, device="cpu", check_greedy=False)
    assert lm.estimator_of(window) == "sampled" and math.isfinite(score(lm, ("The lazy", " dog"))[0][0])


def test_a_greedy_continuation_is_recognised(make_model, tiny_tokenizer):
    model = make_model(vocab_size=len(tiny_tokenizer), mask_token_id=3, block_size=4)
    lm = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu")
    context = tiny_tokenizer("A block is")["input_ids"]
    written = model.generate(torch.tensor([context]), max_new_tokens=9, do_sample=False)[0, len(context) :].tolist()
    requests = [(("", ""), context, written[:count]) for count in (0, 1, 5, 9)]
    requests += [(("", ""), context, [*written[:2], (written[2] + 1) % 300]), (("", ""), context[:1], written[:9])]
    found = [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert found == [True] * 4 + [False] * 2
    plain = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu", check_greedy=False)
    assert not any(greedy for _, greedy in plain._loglikelihood_tokens(requests, disable_tqdm=True))


def test_an_empty_context_is_the_beginning_of_a_text(adapter, tiny_tokenizer):
    lm = adapter()
    found = score(lm, ("", "A block"), ("", "<bos>A block"), ("<bos>", "A block"), ("A block", ""))
    ids = [0, *tiny_tokenizer("A block")["input_ids"]]
    expected = -lm.model.token_nll(torch.tensor([ids]), estimator="exact").nll[0, 1:].sum().item()
    assert [value for value, _ in found] == pytest.approx([expected] * 3 + [0.0], rel=1e-5)
    begun = adapter(add_bos_token=True)
    assert begun._encode("A", " block")[0] == [0, *tiny_tokenizer("A")["input_ids"]]
    assert begun._encode("<bos>A", " block")[0] == [0, *tiny_tokenizer("A")["input_ids"]]


def test_a_text_longer_than_the_window_is_the_sum_of_its_windows(adapter, tiny_tokenizer):
    lm = adapter(max_length=12)
    text = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on."
    (rolled,) = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)], disable_tqdm=True)
    found = request_windows([0], tiny_tokenizer(text)["input_ids"], 12)
    assert len(found) > 2
    requests = [(("", ""), w.ids[: w.num_context], w.ids[w.num_context :]) for w in found]
    parts = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert rolled == pytest.approx(sum(value for value, _ in parts), rel=1e-5)
    assert score(lm, ("", text))[0][0] == pytest.approx(rolled, rel=1e-5)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_end_with_the_first_string_that_ends_them(make_model, tiny_tokenizer):
    model = make_model(vocab_size=len(tiny_tokenizer), mask_token_id=3, block_size=4)
    prompts = ["A block is", "The quick brown", "", "The lazy dog sleeps on. " * 9]
    texts = {}
    for size in (1, 4):
        lm = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu", batch_size=size)
        wanted = {"max_gen_toks": 12, "temperature": 0.8, "until": []}
        requests = [asked("generate_until", p, wanted, doc=n) for n, p in enumerate(prompts)]
        texts[size] = lm.generate_until(requests, True)
    assert texts[1] == texts[4] and len(set(texts[1])) == 4
    whole = texts[1][0]
    stops = [letter for letter in whole[2:] if letter.isascii() and letter.isalnum()][:2]
    wanted = {**wanted, "until": stops}
    (cut,) = lm.generate_until([asked("generate_until", prompts[0], wanted, doc=0)], True)
    assert cut == whole[: min(whole.find(stop) for stop in stops)]


def test_a_repeated_request_gets_different_texts(make_model, tiny_tokenizer):
    model = make_model(vocab_size=len(tiny_tokenizer), mask_token_id=3, block_size=4)
    lm = BD3LMHarness(model, tokenizer=tiny_tokenizer, device="cpu")
    request = asked("generate_until", "A block is", {"max_gen_toks": 8, "do_sample": True}, doc=0)
    first = lm.generate_until([request] * 3, True)
    assert len(set(first)) == 3 and lm.generate_until([request] * 3, True) == first


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_uses_its_cpu(model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (None, "cuda:0", "cpu"):
        assert BD3LMHarness(str(model_folder), device=name).device == torch.device("cpu")


def test_a_plain_decoder_writes_but_has_no_likelihood(gpt2_folder):
    lm = BD3LMHarness(str(gpt2_folder), device="cpu")
    assert lm.max_length == lm.model.config.max_position_embeddings
    assert isinstance(lm.generate_until([asked("generate_until", "A", {"max_gen_toks": 3})], True)[0], str)
    with pytest.raises(ValueError, match="has no likelihood"):
        score(lm, ("A", " block"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size='auto': give an integer >= 1"),
        ({"num_samples": 0}, "num_samples=0: give an integer"),
        ({"max_gen_toks": 1.5}, "max_gen_toks=1.5: give an integer"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks=inf: give an integer"),
        ({"max_gen_toks": 10**400}, "max_gen_toks=1000.*: give an integer"),
        ({"estimator": "best"}, "estimator='best' is unknown: choose one of auto, exact, stratified, sampled"),
        ({"parallelize": True}, "parallelize: there is no such argument; see BD3LMHarness"),
        ({"max_length": 33}, "max_length=33: the model reads from 2 to 32 tokens at once"),
    ],
)
def test_invalid_arguments_are_refused(adapter, arguments, message):
    with pytest.raises(ValueError, match=message):
        adapter(**arguments)


def test_requests_that_a_model_cannot_serve_are_refused(adapter, tiny_tokenizer, monkeypatch):
    lm = adapter()
    lm.model.has_likelihood = False
    message = "a BD3LMForMaskedLM, which has no likelihood: choose tasks whose output_type is generate_until"
    with pytest.raises(ValueError, match=message):
        lm.loglikelihood_rolling([asked("loglikelihood_rolling", "A block")], disable_tqdm=True)
    with pytest.raises(ValueError, match="needs a tokenizer: give it as tokenizer="):
        BD3LMHarness(lm.model)
    with pytest.raises(ValueError, match="until=3: give a string or a list of strings"):
        lm.generate_until([asked("generate_until", "A", {"until": 3})], True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the adapter runs in one process: start it without accelerate launch"):
        adapter()


# --- the harness's requests in our words -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1, 5, 40])
@pytest.mark.parametrize("written", [0, 1, 7, 8, 15, 16, 40])
def test_each_token_is_scored_once_in_windows_that_fit_the_model(given, written):
    text = list(range(given + written))
    found = request_windows(text[:given], text[given:], 8)
    assert [token for window in found for token in window.ids[window.num_context :]] == text[given:]
    for window in found:
        assert 1 <= window.num_context <= len(window.ids) <= 8
        assert window.ids == text[window.ids[0] : window.ids[-1] + 1]
    if written and len(found[-1].scored) < 7:
        assert len(found[-1].ids) == min(8, len(text))


def test_the_options_of_a_task_are_translated_to_those_of_generate():
    for options, expected in (
        ({"until": "x", "temperature": 0.0, "top_p": 0.5}, (7, ("x",), {"do_sample": False})),
        ({"max_new_tokens": 3, "temperature": 0.5}, (3, (), {"temperature": 0.5, "do_sample": True})),
        ({"do_sample": True, "top_p": 0.5}, (7, (), {"do_sample": True, "top_p": 0.5})),
    ):
        assert generation_request(options, 7) == expected
    assert generation_request({"do_sample": False, "temperature": 1.0, "until": ["", "y"]}, 7).until == ("y",)
