"""Scores on disk and among processes: nothing is scored twice, nothing is mixed, and no count of processes matters."""

import json
import sys
import threading
from typing import NamedTuple

import pytest
import torch

from bd3lm_hf.evaluation.perplexity import Protocol, SequenceScore, score_sequences
from bd3lm_hf.evaluation.results import Processes, ScoresFile, score_shared


RUN = {"weights": "a", "seed": 0}
OTHER = {"weights": "b", "seed": 0}


class _TokenNLL(NamedTuple):
    nll: torch.Tensor
    mask: torch.Tensor


class CountingModel:
    """Gives every token its id as loss, counts the batches, and dies at the one it is told to."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.batches, self.dies_at = [], dies_at

    def token_nll(self, input_ids, attention_mask, **arguments):
        self.batches.append(input_ids[:, 0].tolist())
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        return _TokenNLL(input_ids.float(), attention_mask.float())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.scores.jsonl"


@pytest.fixture
def sequences() -> list[list[int]]:
    return [[number, 1, 2] if number % 3 else [number, 5] for number in range(10)]


def score(model, sequences, **arguments):
    protocol = Protocol("exact", 1, 0, len(sequences))
    return score_shared(model, sequences, protocol, batch_size=2, identity=RUN, **arguments)


def test_shared_scores_are_those_of_the_library(sequences):
    found = score(CountingModel(), sequences)
    assert sorted(found.scores.values()) == score_sequences(CountingModel(), sequences, batch_size=2)
    assert found.seconds > 0


def test_a_bar_shows_how_far_it_is_and_where_it_went_on(path, sequences, capsys, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        score(CountingModel(dies_at=4), sequences, file=ScoresFile(path))
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    score(CountingModel(), sequences, file=ScoresFile(path), progress=True)
    assert "scoring:  60%" in capsys.readouterr().err
    score(CountingModel(), sequences)
    assert capsys.readouterr().err == ""


def test_an_interrupted_evaluation_goes_on_where_it_stopped(path, sequences):
    whole = CountingModel()
    expected = score(whole, sequences).scores
    first, second = CountingModel(dies_at=4), CountingModel()
    with pytest.raises(KeyboardInterrupt):
        score(first, sequences, file=ScoresFile(path))
    assert score(second, sequences, file=ScoresFile(path)).scores == expected
    # The batches are those of an undisturbed run, so that not even rounding differs.
    assert first.batches[:3] + second.batches == whole.batches
    again = CountingModel()
    found = score(again, sequences, file=ScoresFile(path))
    assert found.scores == expected and not again.batches
    assert found.seconds > 0


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_what_a_kill_leaves_of_a_line_is_cut_off(path, sequences, cut):
    with pytest.raises(KeyboardInterrupt):
        score(CountingModel(dies_at=4), sequences, file=ScoresFile(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    expected = score(CountingModel(), sequences).scores
    assert score(CountingModel(), sequences, file=ScoresFile(path)).scores == expected
    assert all(json.loads(line)["run"] for line in path.read_text().splitlines())


def test_finished_runs_lie_beside_each_other(path):
    file = ScoresFile(path)
    for run, nll in ((RUN, 1.5), (OTHER, 2.5)):
        file.begin(run)
        file.append(run, [SequenceScore(0, nll, 3)], 0.5)
        file.finish(run)
    again = ScoresFile(path)
    assert again.begin(RUN).scores == {0: SequenceScore(0, 1.5, 3)}
    assert again.begin(OTHER).scores == {0: SequenceScore(0, 2.5, 3)}
    assert again.begin(OTHER).seconds == 0.5


def test_another_run_than_the_interrupted_one_is_refused_with_the_difference(path):
    file = ScoresFile(path)
    file.begin(RUN)
    file.append(RUN, [SequenceScore(0, 1.5, 3)], 0.5)
    message = r"x.scores.jsonl holds 1 scores of another run .*interrupted: weights was a and is b\. .*--restart"
    with pytest.raises(ValueError, match=message):
        ScoresFile(path).begin(OTHER)


def test_a_restart_drops_what_was_kept(path):
    file = ScoresFile(path)
    file.begin(RUN)
    file.append(RUN, [SequenceScore(0, 1.5, 3)], 0.5)
    again = ScoresFile(path, restart=True)
    assert path.exists()  # nothing is lost before there is something in its place
    assert again.begin(OTHER).scores == {}
    assert [json.loads(line)["identity"] for line in path.read_text().splitlines()] == [OTHER]


@pytest.mark.parametrize(
    "content", ["text\n", "[1]\n", '{"run": "x"}\n', '{"run": "x", "scores": [[0, 1.0, 2]], "seconds": 1}\n', "3\n"]
)
def test_a_file_with_something_else_in_it_is_refused(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1"):
        ScoresFile(path)


class Threads(Processes):
    """Processes that are threads, which meet in every exchange."""

    def gather(self, items):
        return [item for theirs in self._exchange(items) for item in theirs]

    def broadcast(self, value):
        return self._exchange(value)[0]

    def _exchange(self, value):
        self.slots[self.rank] = value
        self.barrier.wait(10)
        seen = list(self.slots)
        self.barrier.wait(10)
        return seen


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_processes_scores_every_batch_once(path, sequences, count):
    alone = CountingModel()
    expected = score(alone, sequences).scores
    slots, barrier = [None] * count, threading.Barrier(count)
    models, found = [CountingModel() for _ in range(count)], {}

    def work(rank: int) -> None:
        processes = Threads(rank, count)
        processes.slots, processes.barrier = slots, barrier
        file = ScoresFile(path) if rank == 0 else None
        found[rank] = score(models[rank], sequences, processes=processes, file=file).scores

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[rank] for rank in range(count)] == [expected] * count
    assert sorted(batch for model in models for batch in model.batches) == sorted(alone.batches)
    assert score(CountingModel(dies_at=1), sequences, file=ScoresFile(path)).scores == expected


class MeasuredFile(ScoresFile):
    """Counts what it writes."""

    written = 0

    def write_line(self, entry):
        self.written += len(json.dumps(entry))
        super().write_line(entry)


def test_what_is_written_grows_with_the_scores_not_with_their_square(tmp_path):
    written = []
    for rounds in (100, 200):
        path = tmp_path / f"{rounds}.jsonl"
        file = MeasuredFile(path)
        file.begin(RUN)
        for number in range(rounds):
            file.append(RUN, [SequenceScore(number, 1.0, 2)], 0.1)
            file.flush()
        written.append(file.written)
        assert path.stat().st_size < 2 * file.written and len(ScoresFile(path).begin(RUN).scores) == rounds
    assert written[1] < 2.1 * written[0]
