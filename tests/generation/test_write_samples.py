"""A model answers messages from a terminal, and fills gaps in texts."""

import io
import sys

import pytest
import torch
from decoders import save_stock, tiny_decoder
from transformers import AutoTokenizer

from bd3lm_hf.generation.write_samples import SEPARATOR, converse
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


@pytest.fixture
def chat_tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_stock("qwen3", tmp_path))


@pytest.fixture
def chat_model():
    return tiny_decoder("qwen3", model_length=64)


@pytest.fixture
def answer(monkeypatch):
    """A function that answers lines of standard input."""

    def run(model, tokenizer, lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return converse(model, tokenizer, {"max_new_tokens": 4, "do_sample": False})

    return run


def test_each_answer_follows_the_whole_conversation(answer, chat_model, chat_tokenizer):
    messages = answer(chat_model, chat_tokenizer, ["hello", "", "more"])
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
    ids = chat_tokenizer.apply_chat_template(messages[:3], **options)
    text = chat_model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert messages[3]["content"] == chat_tokenizer.decode(text, skip_special_tokens=True).strip()


def test_reset_forgets_and_exit_ends(answer, chat_model, chat_tokenizer):
    messages = answer(chat_model, chat_tokenizer, ["hello", "/reset", "more", "/exit", "unread"])
    assert [m["content"] for m in messages if m["role"] == "user"] == ["more"]


def test_a_tokenizer_without_a_template_is_refused(answer, chat_model, chat_tokenizer):
    chat_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat"):
        answer(chat_model, chat_tokenizer, ["hello"])


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


def test_texts_come_from_a_file_and_are_reproduced_by_the_seed(infill, tmp_path):
    (tmp_path / "texts.txt").write_text("The ___ fox\n\nA ___ is written\n")
    first, second, other = (infill("--text-file", tmp_path / "texts.txt", "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != other
    one, two = first.split(f"\n{SEPARATOR}\n")
    assert one.startswith("The") and one.endswith("fox") and two.endswith("is written\n")
