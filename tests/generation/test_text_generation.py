"""Texts are the same alone and in any batch; a samples file keeps all finished ones, and foreign files are kept."""

import json
from pathlib import Path

import pytest
import torch
from generating import make_family
from shared_models import randomized, tiny_bd3lm, tiny_gpt2

from bd3lm_hf.generation.text_generation import SamplesFile, generate_batch


SEEDS = [11, 12, 13, 14]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampler": "ancestral", "num_denoising_steps": 3},
        {"sampler": "confidence", "confidence_threshold": 0.05},
        {"sampler": "entropy_bound", "entropy_bound": 2.0},
        {"remask_fraction": 0.5},
        {"nucleus_p": 0.9, "sampling_dtype": "float64"},
    ],
)
def test_a_sampled_text_does_not_depend_on_its_batch(make_model, fields):
    model = make_model(block_size=4)
    prompts = [[0, 5, 6]] * 4
    together = generate_batch(model, prompts, 13, seeds=SEEDS, do_sample=True, **fields)
    options = {"do_sample": True, **fields}
    pairs = [generate_batch(model, prompts[:2], 13, seeds=SEEDS[at : at + 2], **options) for at in (0, 2)]
    alone = [generate_batch(model, prompts[:1], 13, seeds=[seed], do_sample=True, **fields)[0] for seed in SEEDS]
    expected = [(text.ids, text.forwards) for text in alone]
    assert [(text.ids, text.forwards) for text in together] == expected
    assert [(text.ids, text.forwards) for pair in pairs for text in pair] == expected
    assert len({tuple(text.ids) for text in together}) == 4
    assert all(text.ids[:3] == [0, 5, 6] and len(text.new_ids) == 13 for text in together)


def test_texts_have_full_length_and_the_end_token_is_restored_afterwards(tiny_config):
    model = tiny_bd3lm()
    with torch.no_grad():
        model.backbone.output_layer.linear.bias[tiny_config.eos_token_id] += 5
    whole = generate_batch(model, [[0]] * 4, 12, seeds=SEEDS, do_sample=True)
    ended = generate_batch(model, [[0]] * 4, 12, seeds=SEEDS, do_sample=True, stop_at_eos=True)
    assert model.generation_config.eos_token_id == tiny_config.eos_token_id
    assert {len(text.new_ids) for text in whole} == {12}
    for text, full in zip(ended, whole, strict=True):
        end = full.new_ids.index(tiny_config.eos_token_id) + 1
        assert text.new_ids == full.new_ids[:end]


def test_a_model_with_a_single_generator_writes_texts_one_by_one():
    model = make_family("ar")
    assert not model.generator_per_row
    together = generate_batch(model, [[0, 7]] * 3, 6, seeds=SEEDS[:3], do_sample=True)
    alone = generate_batch(model, [[0, 7]], 6, seeds=SEEDS[2:3], do_sample=True)
    assert together[2].ids == alone[0].ids and together[0].ids != together[1].ids
    assert [text.forwards for text in together] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_text_that_ends_early_takes_fewer_forward_passes_than_its_batch(kind):
    model = make_family("ar") if kind == "ours" else randomized(tiny_gpt2())
    prompts = [[0, token] for token in range(5, 21)]
    whole = generate_batch(model, prompts, 12, seeds=range(16), do_sample=False)
    assert {text.forwards for text in whole} == {text.batch_forwards for text in whole} == {12}
    model.generation_config.eos_token_id = whole[0].new_ids[2]
    ended = generate_batch(model, prompts, 12, seeds=range(16), do_sample=False, stop_at_eos=True)
    assert [text.forwards for text in ended] == [len(text.new_ids) for text in ended]
    longest = max(len(text.new_ids) for text in ended)
    assert ended[0].forwards < longest and {text.batch_forwards for text in ended} == {longest}


PROMPTS = [None, "one", "two"]
SETTINGS = {"seed": 3, "temperature": 0.5}


def sample(index: int) -> dict:
    return {"index": index, "prompt": PROMPTS[index], "text": f"text {index}\u2028ä", "settings": SETTINGS}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "samples.jsonl"


def test_samples_are_lines_of_json_that_a_second_run_finds(path):
    first = SamplesFile(path, PROMPTS, SETTINGS)
    assert first.finished == set() and first.rows() == []
    first.append([sample(2), sample(0)])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [sample(2), sample(0)]
    second = SamplesFile(path, PROMPTS, SETTINGS)
    assert second.finished == {0, 2} and [row["index"] for row in second.rows()] == [0, 2]
    second.append([sample(1)])
    assert [row["index"] for row in SamplesFile(path, PROMPTS, SETTINGS).rows()] == [0, 1, 2]


def test_each_sample_is_on_disk_before_the_next_is_taken(path):
    def samples():
        for index in range(3):
            assert (path.read_bytes().count(b"\n") if path.exists() else 0) == index
            yield sample(index)

    SamplesFile(path, PROMPTS, SETTINGS).append(samples())


def test_a_setting_that_is_no_longer_given_is_refused_by_name(path):
    SamplesFile(path, PROMPTS, SETTINGS).append([sample(0)])
    with pytest.raises(ValueError, match="temperature is 0.5 there and None now"):
        SamplesFile(path, PROMPTS, {"seed": 3})


@pytest.mark.parametrize(
    "content",
    [
        *(b"a text\n", b"a text", b"[]\n", b"\x89PNG\r\n\x1a\n"),
        *(b'{"index": "0", "settings": {}}\n', b'{"index": 0}\n'),
        *(b'{"index": 0, "settings": 3}\n', b'{"results": 1}', b"\n", b"\x00\x00", b"[" * 100_000 + b"\n"),
    ],
)
def test_a_file_that_is_not_ours_is_not_changed(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="--samples .*--overwrite"):
        SamplesFile(path, PROMPTS, SETTINGS, flag="--samples")
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", [b"", b'{"index": 9}\n'])
def test_a_file_that_somebody_else_changes_is_not_written_to(path, change):
    file = SamplesFile(path, PROMPTS, SETTINGS)
    file.append([sample(0)])
    path.write_bytes(change)
    with pytest.raises(ValueError, match=f"{len(change)} bytes"):
        file.append([sample(1)])
    assert path.read_bytes() == change
