import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset

from bd3lm_hf.data.packing import pack
from bd3lm_hf.data.streaming import PackedStream, read_position, write_position
from bd3lm_hf.tokenization import train_tokenizer


TEXTS = [f"document {i} says: " + "so it goes, " * (i % 11) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def source(texts: list[str] = TEXTS) -> IterableDataset:
    return Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)


def rows(stream, count: int | None = None) -> list[tuple[int, ...]]:
    """The next `count` sequences, or all that remain; the position of a stream that is cut short is kept."""
    return [tuple(example["input_ids"].tolist()) for example in itertools.islice(stream, count)]


@pytest.mark.parametrize("insert_special", [False, True])
def test_a_stream_gives_the_same_sequences_as_packing(tokenizer, insert_special: bool) -> None:
    settings = {"length": 32, "insert_special": insert_special}
    at_once = pack(Dataset.from_dict({"text": TEXTS}), tokenizer, **settings)
    streamed = list(PackedStream(source(), tokenizer, **settings))
    assert len(streamed) == len(at_once)
    for got, expected in zip(streamed, at_once, strict=True):
        assert {key: value.tolist() for key, value in got.items()} == expected


def test_the_shuffle_keeps_every_sequence_in_an_order_that_depends_only_on_seed_and_epoch(tokenizer) -> None:
    def shuffled(seed: int, epoch: int) -> list[tuple[int, ...]]:
        stream = PackedStream(source(), tokenizer, length=32, shuffle_buffer=40, seed=seed)
        stream.set_epoch(epoch)
        first = rows(stream)
        assert rows(stream) == first  # a second pass of the same epoch
        return first

    ordered = rows(PackedStream(source(), tokenizer, length=32))
    assert shuffled(1, 0) == shuffled(1, 0) != ordered
    assert sorted(shuffled(1, 0)) == sorted(ordered)
    assert len({tuple(shuffled(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("shuffle_buffer", [0, 40])
@pytest.mark.parametrize("taken", [0, 1, 57, "all but 3", "all"])
def test_a_stream_resumes_at_the_exact_sequence(tokenizer, tmp_path, shuffle_buffer: int, taken: int | str) -> None:
    def fresh() -> PackedStream:
        stream = PackedStream(source(), tokenizer, length=32, shuffle_buffer=shuffle_buffer, seed=3)
        stream.set_epoch(1)
        return stream

    expected = rows(fresh())
    count = {"all but 3": len(expected) - 3, "all": len(expected)}.get(taken, taken)
    stream = fresh()
    examples = iter(stream)
    before, position = rows(examples, count), stream.state_dict()
    rows(examples)  # continuing does not change the recorded position
    write_position(position, tmp_path / "stream.npz")
    resumed = PackedStream(source(), tokenizer, length=32, shuffle_buffer=shuffle_buffer, seed=3)
    resumed.load_state_dict(read_position(tmp_path / "stream.npz"))
    resumed.set_epoch(0)  # a trainer does this before each epoch; it does not change the position
    assert before + rows(resumed) == expected
    resumed.set_epoch(1)
    assert rows(resumed) == expected  # the epoch after the resumed one is complete


def test_a_stream_resumes_more_than_once(tokenizer) -> None:
    def fresh() -> PackedStream:
        return PackedStream(source(), tokenizer, length=32, shuffle_buffer=10, seed=3)

    expected, got, state = rows(fresh()), [], None
    while len(got) < len(expected):
        stream = fresh()
        if state is not None:
            stream.load_state_dict(state)
        got += rows(stream, 25)
        state = stream.state_dict()
    assert got == expected


def test_a_data_loader_batches_the_stream_in_its_own_process(tokenizer, monkeypatch) -> None:
    loader = torch.utils.data.DataLoader(PackedStream(source(), tokenizer, length=32), batch_size=4)
    shapes = {key: tuple(value.shape) for key, value in next(iter(loader)).items()}
    assert shapes == dict.fromkeys(("input_ids", "labels", "attention_mask"), (4, 32))
    # As in a worker: starting real ones and waiting for their end would take ten seconds.
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="2 data loader workers .*dataloader_num_workers"):
        next(iter(loader))


def test_a_stream_shorter_than_a_sequence_and_a_negative_buffer_are_refused(tokenizer) -> None:
    for text in ("a", ""):
        stream = PackedStream(Dataset.from_dict({"text": [text]}).to_iterable_dataset(), tokenizer, length=32)
        with pytest.raises(ValueError, match=r"\d tokens.* 32"):
            list(stream)
    with pytest.raises(ValueError, match="shuffle_buffer is -1"):
        PackedStream(source(), tokenizer, length=32, shuffle_buffer=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 16}, "length=32.* 16"),
        ({"seed": 4}, "seed=3.* 4"),
        ({"shuffle_buffer": 5}, "shuffle_buffer=10.* 5"),
        ({"insert_eos": False}, "insert_eos=True.* False"),
    ],
)
def test_the_position_of_another_stream_is_refused(tokenizer, change: dict, message: str) -> None:
    settings = {"length": 32, "shuffle_buffer": 10, "seed": 3}
    state = PackedStream(source(), tokenizer, **settings).state_dict()
    other = PackedStream(source(), tokenizer, **{**settings, **change})
    assert other.identity != PackedStream(source(), tokenizer, **settings).identity
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_a_stream_that_breaks_off_reports_where(tokenizer) -> None:
    def broken():
        yield {"text": "one " * 100}
        raise OSError("connection reset")

    stream = PackedStream(IterableDataset.from_generator(broken), tokenizer, length=32)
    with pytest.raises(ValueError, match=r"\{.*OSError: connection reset"):
        list(stream)
