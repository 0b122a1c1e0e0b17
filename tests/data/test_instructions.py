import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value

from bd3lm_hf.data.documents import find_schema, load_rows
from bd3lm_hf.data.instructions import encode_rows, texts_of
from bd3lm_hf.data.schemas import Messages, PromptCompletion, TextRow


TURN = "{{ '<bos>' + m.role + ':' }}"
PLAIN = "{% for m in messages %}" + TURN + "{{ m.content + '<eos>\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ '<bos>assistant:' }}{% endif %}"
MARKED = "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<eos>' }}"
MARKED += "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<eos>\n' }}{% endif %}{% endfor %}"
CHAT = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two."},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four."},
]


@pytest.fixture
def encode(tiny_tokenizer):
    """A function that encodes prompt/completion pairs or conversations of one row each."""

    def of(*rows, **options):
        if isinstance(rows[0], tuple):
            table = {"prompt": [row[0] for row in rows], "completion": [row[1] for row in rows]}
            schema = PromptCompletion()
        else:
            table, schema = {"messages": [json.dumps(row) for row in rows]}, Messages()
        defaults = {"length": 256, "block_size": 4}
        return encode_rows(Dataset.from_dict(table), schema, tiny_tokenizer, **{**defaults, **options})

    return of


def learned(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def given(tokenizer, row) -> str:
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])


def test_the_prompt_is_given_and_the_completion_is_learned(encode, tiny_tokenizer) -> None:
    (row,) = encode(("A prompt", " and its end"))
    assert given(tiny_tokenizer, row) == "A prompt"
    assert learned(tiny_tokenizer, row).replace("<eos>", "") == " and its end"
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    prompt = tiny_tokenizer("A prompt")["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt  # the sequence starts with it
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_end_tokens_fill_the_last_block_and_are_learned_there(encode, tiny_tokenizer, block_size) -> None:
    completions = [" x" * count for count in range(9)]
    rows = encode(*(("ab", text) for text in completions), block_size=block_size)
    for completion, row in zip(completions, rows, strict=True):
        used = len(tiny_tokenizer("ab")["input_ids"]) + len(tiny_tokenizer(completion)["input_ids"])
        ends = len(row["input_ids"]) - used
        assert 1 <= ends <= block_size
        assert len(row["input_ids"]) % block_size == 0
        assert row["input_ids"][used:] == row["labels"][used:] == [tiny_tokenizer.eos_token_id] * ends


def test_an_empty_prompt_becomes_the_begin_token_also_after_its_change(tmp_path: Path, tiny_tokenizer) -> None:
    Dataset.from_dict({"prompt": [""], "completion": ["text"]}).save_to_disk(str(tmp_path))
    rows = Dataset.load_from_disk(str(tmp_path))
    for token in ("<bos>", "<eos>"):
        tiny_tokenizer.bos_token = token
        (row,) = encode_rows(rows, PromptCompletion(), tiny_tokenizer, length=64, block_size=4)
        assert (row["input_ids"][0], row["labels"][0]) == (tiny_tokenizer.bos_token_id, -100)


def test_names_of_control_tokens_in_data_are_text(encode, tiny_tokenizer) -> None:
    (row,) = encode(("say <mask>", " <eos> no"))
    assert tiny_tokenizer.mask_token_id not in row["input_ids"]
    assert row["labels"].index(tiny_tokenizer.eos_token_id) >= len(row["labels"]) - 4


def test_with_marks_every_turn_of_the_assistant_is_learned(encode, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = MARKED
    (row,) = encode(CHAT)
    text = learned(tiny_tokenizer, row)
    assert text.startswith("two.<eos>four.<eos>")
    assert text.removeprefix("two.<eos>four.<eos>").replace("<eos>", "") == ""
    assert given(tiny_tokenizer, row) == "<bos>user:one?<eos>\n<bos>assistant:\n<bos>user:three?<eos>\n<bos>assistant:"
    assert row["input_ids"][-1] == tiny_tokenizer.eos_token_id
    one, two = encode(CHAT[:2], CHAT[:3])
    assert one == two  # what follows the last answer is left out


def test_a_turn_of_weight_0_is_given(encode, tiny_tokenizer) -> None:
    messages = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    for template in (MARKED, PLAIN):
        tiny_tokenizer.chat_template = template
        (row,) = encode(messages)
        assert learned(tiny_tokenizer, row).rstrip("<eos>") == "four."
    tiny_tokenizer.chat_template = MARKED.replace("'assistant' %}{% gen", "'assistant' and loop.last %}{% gen")
    with pytest.raises(ValueError, match="marks 1 of the assistant's 2 turns"):
        encode(messages)


def test_without_marks_every_turn_is_found_by_what_the_template_adds(encode, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = PLAIN
    (row,) = encode(CHAT)
    assert learned(tiny_tokenizer, row).rstrip("<eos>") == "two.<eos>four."
    for turn in (1, 3):  # as the model is asked later
        asked = tiny_tokenizer.apply_chat_template(CHAT[:turn], add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: len(asked)] == asked
        assert row["labels"][len(asked) - 1] == -100 != row["labels"][len(asked)]
    assert encode(CHAT[:3])[0] == encode(CHAT[:2])[0]


def test_a_template_with_another_last_turn_is_read(encode, tiny_tokenizer) -> None:
    """The template is like Qwen3's: it puts an empty thought before the last answer and joins the results of tools."""
    answer = "{{ '<bos>assistant:' + ('<think>' if loop.last else '') + m.content }}{% for c in m.tool_calls or [] %}"
    answer += "{{ '<call>' + c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<eos>\n' }}"
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
    template += answer + "{% elif m.role == 'tool' %}{{ '[' + m.content + ']' }}"
    template += "{% if loop.last or messages[loop.index].role != 'tool' %}{{ '<eos>\n' }}{% endif %}"
    template += "{% else %}{{ m.content + '<eos>\n' }}{% endif %}{% endfor %}"
    tiny_tokenizer.chat_template = template + "{% if add_generation_prompt %}{{ '<bos>assistant:' }}{% endif %}"
    call = {"function": {"name": "f", "arguments": {"n": 1}}}
    tool = {"role": "tool", "content": "1"}
    messages = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}, tool, tool, *CHAT[1:]]
    rows = Dataset.from_dict({"messages": [json.dumps(messages)], "tools": [json.dumps([{"name": "f"}])]})
    (row,) = encode_rows(rows, Messages(), tiny_tokenizer, length=256, block_size=4)
    text = learned(tiny_tokenizer, row).rstrip("<eos>")
    assert text == '<call>f{"n": 1}<eos>two.<eos><think>four.'
    assert given(tiny_tokenizer, row).startswith('[{"name": "f"}]one?<eos>\n<bos>assistant:')


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_the_block_in_which_a_turn_ends_is_filled_on_request(encode, tiny_tokenizer, template, block_size) -> None:
    tiny_tokenizer.chat_template = template
    (plain,), (row,) = (encode(CHAT, block_size=block_size, fill_turns=fill) for fill in (False, True))
    end = tiny_tokenizer.eos_token_id
    labels = row["labels"]
    stops = [i + 1 for i, label in enumerate(labels) if label != -100 and [*labels, -100][i + 1] == -100]
    assert len(stops) == 2 and all(stop % block_size == 0 for stop in stops)
    for stop in stops:
        ends = next(count for count in range(1, stop) if labels[stop - 1 - count] != end)
        assert 1 <= ends <= block_size  # the turn's own end and the rest of its block, no more
    assert [i for i in row["input_ids"] if i != end] == [i for i in plain["input_ids"] if i != end]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}" + PLAIN, "turn 1: .*generation"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}nothing", "no assistant tokens"),
        (None, "no chat template.*prompt and completion"),
    ],
)
def test_a_template_that_is_missing_or_hides_the_answers_is_refused(encode, tiny_tokenizer, template, message):
    tiny_tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode(CHAT)


def test_long_rows_are_never_cut(encode, caplog) -> None:
    rows = [("short", " row"), ("This is a long", " row" * 40), ("short", " too")]
    with pytest.raises(ValueError, match=r"1 of 3 rows .* 32 tokens.*'This is "):
        encode(*rows, length=32)
    assert len(encode(*rows, length=32, long_rows="drop")) == 2
    assert "Dropped rows: 1 of 3 rows have more than 32 tokens" in caplog.text
    with pytest.raises(ValueError, match="1 of 1 rows .*model_length"):
        encode(rows[1], length=32, long_rows="drop")


def test_the_end_tokens_count_for_the_length(encode, tiny_tokenizer) -> None:
    text = " x" * 8
    used = len(tiny_tokenizer(text)["input_ids"]) + 1
    assert used % 4
    assert len(encode(("", text), length=-(-used // 4) * 4)) == 1
    with pytest.raises(ValueError, match="1 of 1 rows"):
        encode(("", text), length=used)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_result_does_not_depend_on_workers(encode, num_proc) -> None:
    rows = [(f"prompt {i}", f" completion {i}" * (i % 5)) for i in range(20)]
    assert encode(*rows, num_proc=num_proc)[:] == encode(*rows)[:]


def test_a_tokenizer_is_trained_on_all_parts_of_a_row() -> None:
    assert list(texts_of(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), PromptCompletion())) == ["a", "b"]
    rows = Dataset.from_dict({"messages": [json.dumps(CHAT)]})
    assert list(texts_of(rows, Messages())) == ["one?", "two.", "three?", "four."]


def test_formats_are_found_by_columns_and_rows_are_held_out(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": f"c{i}", "n": i}) + "\n" for i in range(60)))
    assert isinstance(find_schema(str(pairs)), PromptCompletion)
    parts = {split: load_rows(str(pairs), PromptCompletion(), split=split) for split in ("train", "validation")}
    assert parts["train"].column_names == ["prompt", "completion"]
    assert set(parts["train"]["prompt"]).isdisjoint(parts["validation"]["prompt"])
    assert len(parts["validation"]) >= 1
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": CHAT[: 2 + i % 3]}) + "\n" for i in range(30)))
    assert isinstance(find_schema(str(chats)), Messages)
    assert json.loads(load_rows(str(chats), Messages())["messages"][0])[:2] == CHAT[:2]
    assert isinstance(find_schema("python-docs"), TextRow)


def test_columns_that_are_not_read_are_not_decoded(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    images = [{"bytes": b"not an image", "path": None}] * 40
    columns = {"prompt": [f"p{i}" for i in range(40)], "completion": ["c"] * 40, "image": images}
    features = Features(prompt=Value("string"), completion=Value("string"), image=Image())
    Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    assert load_rows(str(tmp_path / "set"), PromptCompletion()).column_names == ["prompt", "completion"]
