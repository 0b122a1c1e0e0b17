import itertools
import json
import math

import pytest
import torch
from tiny_runs import packed_stream
from two_processes import STEPS, train

from bd3lm_hf.modeling.configuration_bd3lm import ARConfig
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.examples import (
    EXAMPLE_INDEX,
    BlockSizeSchedule,
    EndlessStream,
    EpochOrder,
    EpochSampler,
    NoiseCollator,
    PaddingCollator,
    noise_of_examples,
)
from bd3lm_hf.training.trainer import BD3LMTrainer


def test_an_epoch_visits_every_row_fills_the_last_step_and_has_its_own_order_and_indices():
    order = EpochOrder([{"row": row} for row in range(10)], seed=0, group_size=4)
    first = [order[item] for item in EpochSampler(order)]
    order.set_epoch(1)
    second = [order[item] for item in EpochSampler(order)]
    assert len(first) == len(order) == len(EpochSampler(order)) == 12
    assert {item["row"] for item in first} == {item["row"] for item in second} == set(range(10))
    assert [item[EXAMPLE_INDEX] for item in first + second] == list(range(24))
    assert [item["row"] for item in first] != [item["row"] for item in second]
    small = EpochOrder([{"row": 0}, {"row": 1}], seed=0, group_size=5)  # fewer rows than a step has are repeated
    assert len(small) == 5 and set(small.permutation(0).tolist()) == {0, 1}


def test_training_data_must_have_sequences():
    with pytest.raises(ValueError, match="0 sequences"):
        EpochOrder([], seed=0, group_size=4)


@pytest.fixture
def collate(tiny_config):
    return NoiseCollator(PaddingCollator(2), tiny_config, seed=0, group_size=8)


@pytest.mark.parametrize("draws", [1, 3])
def test_noise_does_not_change_with_a_longer_neighbour(tiny_config, draws):
    collate = NoiseCollator(PaddingCollator(2), tiny_config, seed=0, group_size=8, num_noise_samples=draws)
    short, long = ({"input_ids": [5] * length, EXAMPLE_INDEX: length} for length in (9, 30))
    alone, together = collate([short]), collate([short, long])
    axis = (draws,) if draws > 1 else ()
    for name, own, whole in (("block_noise", 3, 8), ("token_noise", 9, 30), ("count_noise", 3, 8)):
        assert tuple(together[name].shape) == (2, *axis, whole)
        assert torch.equal(alone[name][0], together[name][0, ..., :own])


def test_padding_has_no_label_and_no_attention():
    batch = PaddingCollator(2)([{"input_ids": [5, 6, 7]}, {"input_ids": [8], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in PaddingCollator(2)([{"input_ids": [5, 6], "attention_mask": [1, 1]}] * 2)


def test_a_model_without_blocks_gets_no_noise():
    collate = NoiseCollator(PaddingCollator(), ARConfig(vocab_size=48), seed=0, group_size=2)
    assert set(collate([{"input_ids": [5, 6], EXAMPLE_INDEX: 0}])) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [5] * 33}, "33 tokens is longer than model_length=32"),
        ({"input_ids": [5, 47, 6], "labels": [-100, 5, -100]}, "mask_token_id=47.*mlm=False"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "shifted by one"),
    ],
)
def test_the_collator_refuses_faulty_text_before_any_device_sees_it(collate, example, message):
    with pytest.raises(ValueError, match=message):
        collate([{**example, EXAMPLE_INDEX: 0}])


def test_the_mask_token_may_be_padding(collate):
    padded = collate([{"input_ids": [5, 47], "attention_mask": [1, 0], "labels": [5, -100], EXAMPLE_INDEX: 0}])
    assert padded["labels"].tolist() == [[5, -100]]


@pytest.fixture
def stream():
    """A function that makes a stream of some thirty short sequences, always the same."""
    return lambda group_size=8: EndlessStream(packed_stream(), group_size=group_size)


def taken(examples, count: int) -> list[tuple[int, tuple[int, ...]]]:
    return [(e[EXAMPLE_INDEX], tuple(e["input_ids"].tolist())) for e in itertools.islice(examples, count)]


def test_a_stream_counts_its_examples_over_all_passes(stream):
    endless = stream()
    length = len(list(endless.stream))
    rows = taken(iter(endless), 2 * length + 5)
    assert [index for index, _ in rows] == list(range(2 * length + 5))
    first, second = ([row for _, row in rows[i * length : (i + 1) * length]] for i in range(2))
    assert sorted(first) == sorted(second)
    assert first != second  # shuffled again
    assert len(endless._positions) <= 5  # old ones are forgotten


@pytest.mark.parametrize("step", [0, 1, 5, 13])
def test_a_stream_continues_after_any_step_with_the_same_examples(stream, step):
    whole = stream()
    rows = iter(whole)
    taken(rows, step * 8 + 9)  # the loader is up to a step ahead of training
    expected = taken(iter(stream()), step * 8 + 60)[step * 8 :]
    rest = stream()
    rest.resume(whole.position(step))
    assert taken(iter(rest), 60) == expected
    with pytest.raises(ValueError, match="recorded with 8 sequences per step, but it is now 4"):
        stream(group_size=4).resume(whole.position(step))


LAYOUT = {"group_size": 8, "num_blocks": 4, "length": 16}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("group", [0, 1, 1000])
def test_noise_of_a_group_hits_every_stratum_once_and_does_not_depend_on_the_batch(group, draws):
    options = {"seed": 0, "num_noise_samples": draws, **LAYOUT}
    indices = range(8 * group, 8 * group + 8)
    noise, backwards = noise_of_examples(indices, **options), noise_of_examples(indices[::-1], **options)
    one_by_one = [noise_of_examples([index], **options) for index in indices]
    axis = (draws,) if draws > 1 else ()
    assert [tuple(field.shape) for field in noise] == [(8, *axis, 4), (8, *axis, 16), (8, *axis, 4)]
    assert sorted((noise.block_noise.double() * 32 * draws).floor().flatten().tolist()) == list(range(32 * draws))
    for field, other, *singles in zip(noise, backwards, *one_by_one, strict=True):
        assert field.dtype == torch.float32 and ((field >= 0) & (field <= 1)).all()
        assert torch.equal(field, other.flip(0)) and torch.equal(field, torch.cat(singles))
        assert len({tuple(row) for row in field.flatten(0, -2).tolist()}) == 8 * draws


def test_the_first_of_several_draws_takes_the_random_numbers_of_a_single_one():
    single = noise_of_examples(range(8), seed=0, **LAYOUT)
    several = noise_of_examples(range(8), seed=0, num_noise_samples=2, **LAYOUT)
    for name, scale in (("token_noise", 1), ("count_noise", 1), ("block_noise", 2)):
        assert torch.equal(getattr(several, name)[:, 0], getattr(single, name) / scale)


def test_groups_examples_and_seeds_have_their_own_noise():
    noise = noise_of_examples(range(64), seed=0, **LAYOUT)
    for field in noise:
        assert len({tuple(row) for row in field.tolist()}) == 64
    first, second = ((noise.block_noise[rows] * 32).floor() for rows in (slice(0, 8), slice(8, 16)))
    assert not torch.equal(first, second)
    other = noise_of_examples(range(64), seed=1, **LAYOUT)
    assert not any(torch.equal(a, b) for a, b in zip(noise, other, strict=True))


def test_the_noise_of_neighbouring_examples_is_not_correlated():
    noise = noise_of_examples(range(400), seed=0, group_size=1, num_blocks=1, length=64)
    for field in noise:
        values = field.double() - 0.5
        product = (values[1:] * values[:-1]).mean() * 12
        assert abs(product) < 4 / math.sqrt(399 * field.shape[1])
        assert abs(values.mean()) < 4 / math.sqrt(12 * values.numel())


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, two_processes):
    """The same run in one process with one batch of 8, with four of 2, and in two processes with batches of 4."""
    folder = tmp_path_factory.mktemp("layouts")
    one, parts = (train(folder / str(size), per_device_train_batch_size=size) for size in (8, 2))
    return one, parts, *(result["ddp"] for result in two_processes[1])


def test_all_layouts_see_the_same_noise(layouts):
    one, parts, *two = layouts
    assert [layout["world_size"] for layout in layouts] == [1, 1, 2, 2]
    assert [layout["accumulation"] for layout in layouts] == [1, 4, 1, 1]
    shared = two[0]["seen"] | two[1]["seen"]
    assert len(two[0]["seen"]) == len(two[1]["seen"]) == STEPS * 4
    for seen in (parts["seen"], shared):
        assert seen.keys() == one["seen"].keys()  # the same sequences in the same optimizer steps
        for key, noise in one["seen"].items():
            assert all(torch.equal(seen[key][name], drawn) for name, drawn in noise.items())


def test_noise_levels_are_stratified_over_the_global_batch(layouts):
    for seen in (layouts[0]["seen"], layouts[1]["seen"], layouts[2]["seen"] | layouts[3]["seen"]):
        for step in range(STEPS):
            levels = torch.cat([noise["block_noise"] for key, noise in seen.items() if key[0] == step])
            assert (levels.sort().values * len(levels)).floor().tolist() == list(range(64))


def test_a_schedule_gives_the_size_of_each_step():
    schedule = BlockSizeSchedule.parse("1:2,4:3,16:0")
    assert [schedule.size_at(step) for step in range(7)] == [1, 1, 4, 4, 4, 16, 16]


@pytest.mark.parametrize("text", ["4", "4:2", "4:0,8:0", "0:2,4:0", "4:-1,8:0", "four:2"])
def test_other_schedules_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="--block_size_schedule"):
        BD3LMTrainingArguments(output_dir=str(tmp_path), block_size_schedule=text)


@pytest.fixture
def seen(tiny_model):
    """The block size and the interval of each training step."""
    steps, objective = [], tiny_model.objective

    def record(*batch, **layout):
        steps.append((tiny_model.config.block_size, *tiny_model.interval()))
        return objective(*batch, **layout)

    tiny_model.objective = record
    return steps


def test_training_takes_each_size_and_saves_the_last(seen, tiny_model, make_trainer, tmp_path):
    make_trainer(tiny_model, block_size_schedule="1:2,4:1,8:0", max_steps=5, per_device_train_batch_size=2).train()
    assert [size for size, *_ in seen] == [1, 1, 4, 8, 8]
    tiny_model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["block_size"] == 8


def test_a_searched_interval_is_dropped_with_its_block_size(seen, tiny_model, make_trainer):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "interval_search": True}
    make_trainer(tiny_model, block_size_schedule="1:2,4:0", max_steps=3, **evaluated).train()
    # Block size 1 compares the whole interval with the full mask, whose losses vary less.
    assert seen == [pytest.approx(step) for step in ((1, 1e-3, 1), (1, 1, 1), (4, 1e-3, 1))]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 5, "block_size=5 does not divide model_length=32"),
        ({"block_size": 32, "cross_attn": False}, 4, "cross_attn=False with block_size=4"),
        ({"resample": True, "sampling_eps_min": 0.55, "sampling_eps_max": 0.7}, 4, r"\[0.55, 0.7\] .* k / 4"),
    ],
)
def test_a_later_size_that_does_not_fit_is_refused_before_training(changes, size, message, tiny_model, tmp_path):
    for name, value in changes.items():
        setattr(tiny_model.config, name, value)
    schedule = f"{tiny_model.config.block_size}:2,{size}:0"
    arguments = BD3LMTrainingArguments(output_dir=str(tmp_path), block_size_schedule=schedule, use_cpu=True)
    with pytest.raises(ValueError, match=f"--block_size_schedule: .*{message}"):
        BD3LMTrainer(tiny_model, arguments)
