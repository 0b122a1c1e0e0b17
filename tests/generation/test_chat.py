"""Conversations: a model answers the lines of a terminal, and a pipeline takes lists of messages."""

import io

import pytest
from decoders import tiny_decoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from bd3lm_hf.cli import main
from bd3lm_hf.generation.write_samples import converse


TEMPLATE = "{% for m in messages %}{{ m.content }} w8 {% endfor %}{% if add_generation_prompt %}w7{% endif %}"


@pytest.fixture
def chat_tokenizer():
    words = {"<eos>": 0, **{f"w{number}": number for number in range(1, 63)}, "<mask>": 63}
    backend = Tokenizer(models.WordLevel(words, unk_token="w5"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<eos>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


@pytest.fixture
def chat_model():
    return tiny_decoder("qwen3", model_length=64)


def answer(model, tokenizer, lines):
    return converse(model, tokenizer, {"max_new_tokens": 4, "do_sample": False}, stdin=io.StringIO("\n".join(lines)))


def test_each_answer_follows_the_whole_conversation(chat_model, chat_tokenizer):
    messages = answer(chat_model, chat_tokenizer, ["hello", "", "more"])
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    ids = chat_tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    text = chat_model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert messages[3]["content"] == chat_tokenizer.decode(text, skip_special_tokens=True).strip()


def test_reset_forgets_and_exit_ends(chat_model, chat_tokenizer):
    messages = answer(chat_model, chat_tokenizer, ["hello", "/reset", "more", "/exit", "unread"])
    assert [m["content"] for m in messages if m["role"] == "user"] == ["more"]


def test_a_pipeline_takes_lists_of_messages(chat_model, chat_tokenizer):
    write = pipeline("text-generation", model=chat_model, tokenizer=chat_tokenizer)
    conversation = [{"role": "user", "content": "hello"}]
    written = write(conversation, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert written[:1] == conversation and written[1]["role"] == "assistant"


def test_flags_that_mean_nothing_in_a_conversation_are_refused(capsys):
    assert main(["generate", "--model", "any", "--chat", "--num-samples", "3"]) == 2
    assert "--num-samples" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_refused(chat_model, chat_tokenizer):
    chat_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat"):
        answer(chat_model, chat_tokenizer, ["hello"])
