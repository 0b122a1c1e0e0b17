"""What the harness asks, in our words."""

import pytest

from bd3lm_hf.evaluation.harness import generation_request, integer_field, request_windows


@pytest.mark.parametrize("given", [1, 5, 40])
@pytest.mark.parametrize("written", [0, 1, 7, 8, 15, 16, 40])
def test_each_token_is_scored_once_in_windows_that_the_model_has(given, written):
    text = list(range(given + written))
    found = request_windows(text[:given], text[given:], 8)
    assert [token for window in found for token in window.ids[window.num_context :]] == text[given:]
    for window in found:
        assert 1 <= window.num_context <= len(window.ids) <= 8
        assert window.ids == text[window.ids[0] : window.ids[-1] + 1]
    if written and len(found[-1].scored) < 7:
        assert len(found[-1].ids) == min(8, len(text))


def test_the_words_of_a_task_are_put_into_those_of_generate():
    for options, expected in (
        ({"until": "x", "temperature": 0.0, "top_p": 0.5}, (7, ("x",), {"do_sample": False})),
        ({"max_new_tokens": 3, "temperature": 0.5}, (3, (), {"temperature": 0.5, "do_sample": True})),
        ({"do_sample": True, "top_p": 0.5}, (7, (), {"do_sample": True, "top_p": 0.5})),
    ):
        assert generation_request(options, 7) == expected
    assert generation_request({"do_sample": False, "temperature": 1.0, "until": ["", "y"]}, 7).until == ("y",)


@pytest.mark.parametrize("value", [0, -1, 1.5, "auto", None])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=f"batch_size={value!r}: give an integer >= 1"):
        integer_field("batch_size", value)
    assert integer_field("batch_size", "4") == integer_field("batch_size", 4.0) == 4
