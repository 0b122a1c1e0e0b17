"""`bd3lm infill`: gaps are filled as `model.infill` fills them, and the rest of a text stays."""

import pytest
import torch
from transformers import AutoTokenizer

from bd3lm_hf.generation.write_samples import SEPARATOR
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


@pytest.fixture
def infill(bd3lm, model_folder):
    """A function that calls `bd3lm infill` with the tiny model."""
    return lambda *arguments: bd3lm("infill", "--model", model_folder, *arguments)


def test_a_gap_is_filled_as_the_library_fills_it(infill, model_folder):
    code, out, err = infill("--text", "The ___ fox", "--greedy", "--gap-tokens", 2)
    assert code == 0, err
    model, tokenizer = BD3LMForMaskedLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("The <mask><mask> fox", return_tensors="pt").input_ids
    filled = model.infill(ids, torch.ones_like(ids), do_sample=False)
    assert out == tokenizer.decode(filled[0], skip_special_tokens=True) + "\n"
    assert infill("--text", "The <mask><mask> fox", "--greedy")[1] == out
    assert infill("--text", "The [.] fox", "--gap", "[.]", "--greedy", "--gap_tokens", 2)[1] == out


def test_texts_come_from_a_file_and_repeat_themselves_with_the_seed(infill, tmp_path):
    (tmp_path / "texts.txt").write_text("The ___ fox\n\nA ___ is written\n")
    first, second, other = (infill("--text-file", tmp_path / "texts.txt", "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != other
    one, two = first.split(f"\n{SEPARATOR}\n")
    assert one.startswith("The") and one.endswith("fox") and two.endswith("is written\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--text"),
        (("--text", "no gap"), "'no gap'"),
        (("--text", "a ___ " * 40), "more than the model's window of 32 tokens"),
        (("--text", "a ___", "--gap-tokens", 0), "--gap-tokens"),
        (("--text", "a ___", "--text-file", "x"), "not allowed with argument"),
        (("--text", "a ___", "--max-new-tokens", 3), "unrecognized arguments"),
    ],
)
def test_bad_input_is_refused_in_one_line(infill, arguments, part):
    code, out, err = infill(*arguments)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err
