import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bd3lm_hf.tokenization import (
    SMALLEST_VOCABULARY,
    check_tokenizer_fits,
    complete_special_tokens,
    encode_prompt,
    limit_to_window,
    load_tokenizer,
    train_tokenizer,
)


TEXTS = ["the quick brown fox jumps over the lazy dog. " * 20, "def function(argument): return argument\n" * 20]
STRANGE = "tabs\tand\r\nlines\n\n naïve 漢字 🤖‍👩 \u200b\u0000 <|mask|> <|endoftext|> it 's , . ﬁ é"


def gpt2_like(**special: str) -> PreTrainedTokenizerFast:
    """Ids 0..9 are words, as in a tokenizer with no mask, padding or begin token."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *"abcdefgh", "<|endoftext|>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def config(vocab_size: int, mask_token_id: int) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=vocab_size, mask_token_id=mask_token_id)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


def test_a_trained_tokenizer_has_special_tokens_and_is_always_the_same(trained: PreTrainedTokenizerFast) -> None:
    assert len(trained) == 300
    assert trained.mask_token_id == 299
    assert None not in (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id)
    assert len({trained.eos_token_id, trained.pad_token_id, trained.mask_token_id}) == 3
    assert trained.padding_side == "left"
    again = load_tokenizer("train", texts=iter(TEXTS), vocab_size=300)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_any_text_survives_a_round_trip(trained: PreTrainedTokenizerFast) -> None:
    ids = trained(STRANGE, split_special_tokens=True)["input_ids"]
    assert trained.decode(ids) == STRANGE
    assert not {trained.mask_token_id, trained.eos_token_id} & set(ids)


def test_a_saved_tokenizer_comes_back_the_same(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == trained.get_vocab()
        assert loaded.special_tokens_map == trained.special_tokens_map
        assert loaded.padding_side == "left"
        assert loaded.decode(loaded(STRANGE)["input_ids"]) == STRANGE


@pytest.mark.parametrize("special", [{}, {"pad_token": "<|mask|>", "mask_token": "<|mask|>"}])
def test_a_tokenizer_without_mask_gets_one_after_its_last_id_and_never_pads_with_it(special: dict) -> None:
    tokenizer = complete_special_tokens(gpt2_like(eos_token="<|endoftext|>", **special))
    assert tokenizer.mask_token_id == 10
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == tokenizer.eos_token_id == 9
    assert len(tokenizer) == 11
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_keeps_the_special_tokens_that_it_has() -> None:
    tokenizer = complete_special_tokens(gpt2_like(mask_token="c", pad_token="d", cls_token="a", sep_token="b"))
    assert (tokenizer.mask_token, tokenizer.pad_token) == ("c", "d")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("a", "b")
    assert len(tokenizer) == 10


def test_a_completed_tokenizer_survives_saving_and_has_the_window(tmp_path: Path) -> None:
    tokenizer = complete_special_tokens(gpt2_like(eos_token="<|endoftext|>"))
    limit_to_window(tokenizer, SimpleNamespace(model_length=4))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.mask_token_id, loaded.pad_token_id) == (10, 9)
    assert len(loaded("a b c d e f", truncation=True)["input_ids"]) == 4


def test_no_end_token_no_corpus_and_a_vocabulary_smaller_than_the_bytes_are_refused() -> None:
    for make, message in (
        (lambda: complete_special_tokens(gpt2_like()), "tokenizer.eos_token"),
        (lambda: load_tokenizer(None), "texts="),
        (lambda: train_tokenizer(TEXTS, vocab_size=100), rf"vocab_size is 100.* {SMALLEST_VOCABULARY} "),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert len(train_tokenizer(TEXTS, vocab_size=SMALLEST_VOCABULARY)) == SMALLEST_VOCABULARY


@pytest.mark.parametrize(
    ("name", "text", "part"), [("config.json", "{}", "save_pretrained"), ("tokenizer.json", "{", "'train'")]
)
def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(tmp_path: Path, name, text, part) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{part}"):
        load_tokenizer(str(tmp_path))


def test_a_prompt_does_not_end_with_the_end_token_that_a_tokenizer_adds() -> None:
    tokenizer = complete_special_tokens(gpt2_like(cls_token="a", sep_token="b"))
    around = processors.TemplateProcessing(single="a $A b", special_tokens=[("a", 1), ("b", 2)])
    tokenizer.backend_tokenizer.post_processor = around
    assert tokenizer("c d")["input_ids"] == [1, 3, 4, 2]
    assert encode_prompt("c d", tokenizer) == [1, 3, 4]
    assert encode_prompt("c b", tokenizer) == [1, 3, 2]  # which the text has itself
    assert encode_prompt("c b", tokenizer, add_special_tokens=False) == [3, 2]


def test_a_fitting_tokenizer_passes(trained: PreTrainedTokenizerFast) -> None:
    check_tokenizer_fits(trained, config(300, 299))
    check_tokenizer_fits(trained, config(512, 299))
    check_tokenizer_fits(gpt2_like(eos_token="<|endoftext|>"), config(11, 10))


def test_a_vocabulary_or_a_mask_id_that_is_not_the_tokenizers_is_refused(trained: PreTrainedTokenizerFast) -> None:
    for tokenizer, vocab_size, mask_token_id, message in (
        (trained, 256, 255, r"299, .*vocab_size is 256.* 300"),
        (trained, 512, 511, r"511.*'<\|mask\|>'.*mask_token_id=299"),
        (gpt2_like(eos_token="<|endoftext|>"), 11, 3, "mask_token_id 3 .*'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tokenizer_fits(tokenizer, config(vocab_size, mask_token_id))


@pytest.mark.parametrize(
    "template",
    ["{{ '%1000000000d' % 1 }}", "{{ 'a' * 1000000000 }}", "{% set x = 10 ** 9 %}", "x" * 1_000_001],
    ids=["format", "repeat", "power", "length"],
)
def test_a_chat_template_that_fills_the_memory_is_refused(tiny_tokenizer, tmp_path, template):
    tiny_tokenizer.chat_template = "**Bold** 1234567 {{ messages[0]['content'] }} {% if loop %}{{ 1 % 2 }}{% endif %}"
    tiny_tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    tiny_tokenizer.chat_template = template
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat template"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("template", [5, {"a": None}])
def test_a_chat_template_that_is_not_a_text_is_refused(tiny_tokenizer, tmp_path, template):
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    with pytest.raises(ValueError, match="chat template .*(int|NoneType)"):
        load_tokenizer(str(tmp_path))
