"""Wrong input to the commands that generate, measure and serve is refused in one line, before anything is printed."""

import shlex

import pytest
from test_cli import assert_refused


# Before a model is loaded: there is none by this name.
UNLOADED = [
    ("generate", "--prompt ''", "--prompt 1 is an empty prompt"),
    ("generate", "--prompt-file nowhere.txt", "--prompt-file nowhere.txt: there is no such file"),
    ("generate", "--prompt-file a.txt --prompt a", "not allowed with argument"),
    ("generate", "--max-new-tokens 0", "--max-new-tokens: expected an integer >= 1, got '0'"),
    ("generate", f"--max_new_tokens {10**24}", f"--max-new-tokens: expected an integer <= {2**31 - 1}"),
    ("generate", "--num-samples 0", "--num-samples: expected an integer >= 1, got '0'"),
    ("generate", "--batch-size few", "--batch-size: expected an integer >= 1, got 'few'"),
    ("generate", "--temperature 0.0", "--temperature: expected a number > 0, got '0.0'"),
    ("generate", "--temperature nan", "--temperature: expected a number > 0, got 'nan'"),
    ("generate", "--nucleus-p 2", "--nucleus-p: expected a number > 0 and <= 1, got '2'"),
    ("generate", "--top-p 2", "--top-p: expected a number > 0 and <= 1, got '2'"),
    ("generate", "--top-k -1", "--top-k: expected an integer >= 0, got '-1'"),
    ("generate", "--repetition-penalty 0", "--repetition-penalty: expected a number > 0"),
    ("generate", "--max-time -3", "--max-time: expected a number > 0"),
    ("generate", "--sampler magic", "invalid choice: 'magic'"),
    ("generate", "--stream --batch-size 2", "--batch-size 2"),
    ("generate", "--chat --num-samples 3", "--num-samples"),
    ("generate", "--greedy --do-sample", "not allowed with argument"),
    ("generate", "--prompts 'a b c'", "unrecognized arguments"),
    ("generate", "--output no/folder/s.jsonl", "--output no/folder/s.jsonl"),
    ("generate", "--output .", "--output ."),
    ("generate", "--output -", "--output -"),
    ("generate", "--overwrite", "--overwrite"),
    ("generate", "--trace trace.txt", "--trace trace.txt"),
    ("generate", "--trace=--", "--trace"),
    ("generate", "--trace fresh.json --output fresh.json", "--trace fresh.json"),
    ("generate", "--trace no/folder/trace.html", "--trace no/folder/trace.html"),
    ("generate", "--device tpu9", "--device tpu9"),
    ("infill", "", "--text"),
    ("infill", "--text 'a ___' --gap-tokens 0", "--gap-tokens"),
    ("infill", "--text 'a ___' --gap ''", "--gap"),
    ("infill", "--text 'a ___' --text-file x", "not allowed with argument"),
    ("infill", "--text 'a ___' --max-new-tokens 3", "unrecognized arguments"),
    ("infill", "--text 'a ___' --context all", "unrecognized arguments"),  # used to be ignored
    ("quality", "--num-samples 1", "--num-samples: expected an integer >= 2, got '1'"),
    ("quality", "--confidence-threshold 2", "--confidence-threshold: expected a number >= 0 and <= 1, got '2'"),
    ("quality", "--plot no/folder/q.png", "--plot no/folder/q.png: the folder"),
    ("quality", "--plot q.txt", "--plot q.txt: the name of a plot must end in one of .png, .svg, .pdf"),
    ("quality", "--output no/folder/q.json", "--output no/folder/q.json: the folder"),
    ("quality", "--greedy", "--dataset"),
    ("bench", "--estimators exact --noise-draws 2", "--noise-draws: not allowed with argument --estimators"),
    ("bench", "--batch-size 0", "--batch-size: expected an integer >= 1, got '0'"),
    ("bench", "--batch-sizes 2 0", "--batch-sizes: expected an integer >= 1, got '0'"),
    ("bench", "--repeats 0", "--repeats: expected an integer >= 1, got '0'"),
    ("bench", "--noise-draws 0", "--noise-draws: expected an integer >= 1, got '0'"),
    ("bench", "--noise-draws 2", "--model ./nowhere: there is no such folder"),
]


@pytest.mark.parametrize(("verb", "words", "part"), UNLOADED)
def test_wrong_words_are_refused_before_a_model_is_loaded(bd3lm, verb, words, part):
    refused = bd3lm(verb, "--model", "./nowhere", *shlex.split(words))
    assert_refused(refused, part)
    assert not refused[1]


@pytest.mark.parametrize("flag", ["--noise-draws 1", "--estimators exact"])
def test_variances_are_those_of_a_trained_model(bd3lm, flag):
    flag = flag.split()
    assert_refused(bd3lm("bench", *flag), f"{flag[0]} measures a trained model: name its folder with --model")


@pytest.mark.parametrize(
    ("verb", "words", "part"),
    [
        ("infill", "--text 'no gap'", "'no gap'"),
        ("infill", f"--text '{'a ___ ' * 40}'", "more than the model's window model_length=32"),
        ("quality", "--new-tokens 32", "new_tokens=32"),
        ("quality", "--dataset TEXT --prompt-tokens 32 --num-samples 2", "window of 32"),
        ("quality", "--dataset TEXT --num-samples 5000", "fewer than the 5000 requested"),
        ("quality", "--judge ./nowhere", "--judge ./nowhere: there is no such folder"),
        ("bench", "--estimators exact --threads 1 --dataset TEXT", "fewer than the 128 requested"),
    ],
)
def test_words_that_do_not_fit_the_model_or_the_text_are_refused(bd3lm, model_folder, text_file, verb, words, part):
    words = [str(text_file) if word == "TEXT" else word for word in shlex.split(words)]
    refused = bd3lm(verb, "--model", model_folder, *words)
    assert_refused(refused, part)
    assert not refused[1]
