"""Block sizes that grow in training."""

import json

import pytest

from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.block_schedule import BlockSizeSchedule
from bd3lm_hf.training.trainer import BD3LMTrainer


def test_a_schedule_gives_the_size_of_each_step():
    schedule = BlockSizeSchedule.parse("1:2,4:3,16:0")
    assert [schedule.size_at(step) for step in range(7)] == [1, 1, 4, 4, 4, 16, 16]


@pytest.mark.parametrize("text", ["4", "4:2", "4:0,8:0", "0:2,4:0", "4:-1,8:0", "four:2"])
def test_other_schedules_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="--block_size_schedule"):
        BD3LMTrainingArguments(output_dir=str(tmp_path), block_size_schedule=text)


def test_training_takes_each_size_and_saves_the_last(tiny_model, make_trainer, tmp_path):
    seen = []
    objective = tiny_model.objective

    def record(*batch, **layout):
        seen.append(tiny_model.config.block_size)
        return objective(*batch, **layout)

    tiny_model.objective = record
    make_trainer(tiny_model, block_size_schedule="1:2,4:1,8:0", max_steps=5, per_device_train_batch_size=2).train()
    assert seen == [1, 1, 4, 8, 8]
    tiny_model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["block_size"] == 8


def test_a_size_that_does_not_divide_the_window_is_refused(tiny_model, tmp_path):
    arguments = BD3LMTrainingArguments(output_dir=str(tmp_path), block_size_schedule="1:2,5:0", use_cpu=True)
    with pytest.raises(ValueError, match="5 does not divide model_length=32"):
        BD3LMTrainer(tiny_model, arguments)
