"""A trace replays to its text, and its page is complete, harmless and shows every step."""

import json

import pytest
from html_page import Page

from bd3lm_hf.generation.denoising_trace import (
    FORMAT,
    VERSION,
    RowStep,
    opening_step,
    pieces,
    trace_document,
    trace_page,
    traced_sample,
    write_trace,
)
from bd3lm_hf.generation.text_generation import GeneratedText


BLOCK = 4
TEXT = "The lazy dog, naïve café prose: 日本 🙂 \n\n</script><b>&amp;</b><!-- x"


@pytest.fixture
def document(tiny_tokenizer) -> dict:
    """Two samples; in the first a wrong token is revealed and masked again, and a character spans several tokens."""
    mask = tiny_tokenizer.mask_token_id
    samples = []
    for index, (prompt, text) in enumerate([("The quick", TEXT), ("A block", " is written.")]):
        prompt_ids, new_ids = tiny_tokenizer(prompt)["input_ids"], tiny_tokenizer(text)["input_ids"]
        steps = backwards(prompt_ids, new_ids, mask)
        traced = GeneratedText([*prompt_ids, *new_ids], len(prompt_ids), steps=steps)
        samples.append(traced_sample(tiny_tokenizer, traced, index=index, prompt=prompt, mask_token_id=mask))
    options = {"settings": {"seed": 0}, "mask_token_id": mask, "block_size": BLOCK}
    return trace_document(tiny_tokenizer, samples, model="tiny", sampler="confidence", **options)


def backwards(prompt_ids, new_ids, mask):
    """Steps that reveal each block from its end, two tokens at once; the first token is wrong at first."""
    ids, first = [*prompt_ids, *new_ids], len(prompt_ids)
    steps = []
    for begin in range(first // BLOCK * BLOCK, len(ids), BLOCK):
        positions = range(begin, begin + BLOCK)
        now = [ids[at] if at < first else mask if at < len(ids) else 5 for at in positions]  # 5: after the end
        todo = [at for at, token in enumerate(now) if token == mask]
        if not steps:
            wrong = list(now)
            wrong[todo[0]] = 40
            steps.append(RowStep(begin, positions, wrong, [0.25 if at == todo[0] else None for at in range(BLOCK)]))
        while todo:
            fresh = [todo.pop() for _ in range(min(2, len(todo)))]
            for at in fresh:
                now[at] = ids[begin + at]
            steps.append(RowStep(begin, positions, list(now), [0.75 if at in fresh else None for at in range(BLOCK)]))
    return steps + [RowStep(begin + BLOCK, [-1] * BLOCK, [mask] * BLOCK, [None] * BLOCK)]


def replay(sample) -> list[list[int | None]]:
    """The tokens at all positions, step by step."""
    first = sample["num_prompt_tokens"]
    state = sample["ids"][:first] + [None] * sample["num_tokens"]
    states = [list(state)]
    for step in sample["steps"]:
        start, stop = sample["blocks"][step["block"]]
        for position, token, confidence in step["changes"]:
            assert start <= position < stop
            assert (state[position] is None) == step["forward"]  # only masks are revealed, only tokens are masked
            assert 0 <= confidence <= 1 if step["forward"] else token is confidence is None
            state[position] = token
        states.append(list(state))
    return states


def test_the_pieces_of_a_text_join_to_the_text(tiny_tokenizer):
    ids = tiny_tokenizer(TEXT)["input_ids"]
    split = pieces(tiny_tokenizer, ids)
    assert len(split.texts) == len(ids)
    texts = dict(enumerate(split.texts)) | {start: text for start, _, text in split.characters}
    assert "".join(texts[number] or "" for number in range(len(ids))) == TEXT == tiny_tokenizer.decode(ids)


def test_bytes_of_one_character_stay_together(tiny_tokenizer):
    ids = tiny_tokenizer("a🙂日b")["input_ids"]
    split = pieces(tiny_tokenizer, ids)
    assert [text for _, _, text in split.characters] == ["🙂", "日"]
    assert [stop - start for start, stop, _ in split.characters] == [4, 3]
    assert split.texts == ["a", *[None] * 7, "b"]


def test_bytes_that_form_no_character_are_shown_one_by_one(tiny_tokenizer):
    smiley, b = tiny_tokenizer("🙂")["input_ids"], tiny_tokenizer("b")["input_ids"]
    assert pieces(tiny_tokenizer, [*smiley[:2], *b]).texts == ["�", "�", "b"]
    assert pieces(tiny_tokenizer, smiley[:3]).texts == ["�"] * 3
    assert pieces(tiny_tokenizer, smiley[1:2] * 6).texts == ["�"] * 6
    assert pieces(tiny_tokenizer, []).texts == []


def test_a_position_belongs_to_the_first_of_the_windows_that_hold_it(tiny_tokenizer):
    steps = [
        RowStep(0, range(4), [0, 11, 12, 13], [None, 0.5, 0.5, 0.5]),
        RowStep(2, range(2, 6), [12, 13, 14, 15], [None, None, 0.5, 0.5]),
    ]
    sample = sample_of(tiny_tokenizer, [11, 12, 13, 14, 15], steps)
    assert sample["blocks"] == [[1, 4], [4, 6]]
    assert replay(sample)[-1] == [0, 11, 12, 13, 14, 15]


def test_a_trace_replays_from_all_masks_to_the_text(document):
    assert document["format"] == FORMAT and document["version"] == VERSION
    for sample in document["samples"]:
        states = replay(sample)
        assert states[0][sample["num_prompt_tokens"] :] == [None] * sample["num_tokens"]
        assert states[-1] == sample["ids"]
        assert sample["forwards"] == sum(step["forward"] for step in sample["steps"])
        assert sample["tokens_per_forward"] == sample["num_tokens"] / sample["forwards"]
        covered = [position for start, stop in sample["blocks"] for position in range(start, stop)]
        assert covered == list(range(sample["num_prompt_tokens"], len(sample["ids"])))


def test_a_token_that_is_masked_again_is_recorded_between_two_forward_passes(document, tiny_tokenizer):
    sample = document["samples"][0]
    first = sample["num_prompt_tokens"]
    assert sample["steps"][0] == {"block": 0, "forward": True, "changes": [[first, 40, 0.25]]}
    assert sample["steps"][1] == {"block": 0, "forward": False, "changes": [[first, None, None]]}
    assert sample["forwards"] == len(sample["steps"]) - 1
    assert document["vocabulary"] == {"40": tiny_tokenizer.decode([40])}


def test_a_token_that_is_masked_and_revealed_again_is_recorded_even_if_it_is_the_same(tiny_tokenizer):
    steps = [RowStep(0, [0, 1], [0, 50], [None, 0.5]), RowStep(0, [0, 1], [0, 50], [None, 0.75])]
    sample = sample_of(tiny_tokenizer, [50], steps)
    assert [step["changes"] for step in sample["steps"]] == [[[1, 50, 0.5]], [[1, None, None]], [[1, 50, 0.75]]]
    assert sample["forwards"] == 2


def sample_of(tokenizer, new_ids, steps) -> dict:
    """Sample 7, a text without a prompt."""
    text = GeneratedText([tokenizer.bos_token_id, *new_ids], 1, steps=steps)
    return traced_sample(tokenizer, text, index=7, prompt=None, mask_token_id=tokenizer.mask_token_id)


def test_special_tokens_are_marked_and_tokens_after_the_end_are_left_out(tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    sample = sample_of(tiny_tokenizer, [50, eos], [RowStep(8, range(4), [0, 50, eos, 60], [None, 0.5, 0.5, 0.5])])
    assert sample["special"] == [0, 2] and sample["texts"][2] == "<eos>"
    assert sample["steps"] == [{"block": 0, "forward": True, "changes": [[1, 50, 0.5], [2, eos, 0.5]]}]


@pytest.mark.parametrize(
    ("blocks", "step"),
    [([0, 0, 1, 1, 2, 2], 3), ([0, 0, 0, 0], 2), ([0, 1, 2, 3], 4), ([0, 0, 1, 2, 3, 4], 1), ([], 0)],
)
def test_the_page_opens_on_a_step_that_leaves_its_block_partly_masked(blocks, step):
    assert opening_step(blocks) == step


def test_colours_follow_the_quantiles_of_the_probabilities(document):
    changes = [c for sample in document["samples"] for step in sample["steps"] for c in step["changes"]]
    shown = sorted(probability for _, _, probability in changes if probability is not None)
    assert len(document["quantiles"]) == 11 and document["quantiles"] == sorted(document["quantiles"])
    assert (document["quantiles"][0], document["quantiles"][-1]) == (shown[0], shown[-1])


def test_the_ending_of_a_file_name_decides_between_page_and_data(document, tmp_path):
    write_trace(document, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == document
    write_trace(document, tmp_path / "trace.HTML")
    assert (tmp_path / "trace.HTML").read_text().startswith("<!doctype html>")


def test_the_page_contains_the_whole_trace_whatever_the_tokens_are(document):
    page = Page(trace_page(document))
    data, script = ("".join(texts) for tag, _, texts in page.elements if tag == "script")
    assert json.loads(data) == document
    assert "</script><b>" in "".join(text or "" for text in json.loads(data)["samples"][0]["texts"])
    assert not set("<>&") & set(data) and data.isascii()
    assert "JSON.parse" in script and "innerHTML" not in script and "eval" not in script
    # It needs no other file, and forbids the network.
    assert not [attrs for _, attrs, _ in page.elements if {"src", "href", "srcset", "action"} & set(attrs)]
    assert "@import" not in trace_page(document) and "url(" not in trace_page(document)
    policy = [attrs["content"] for _, attrs, _ in page.elements if attrs.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_every_control_of_the_page_has_a_name(document):
    page = Page(trace_page(document))
    labelled = {attrs["for"] for tag, attrs, _ in page.elements if tag == "label"}
    controls = [attrs for tag, attrs, _ in page.elements if tag in ("button", "input", "select")]
    assert len(controls) == 9
    for attrs in controls:
        assert attrs.get("aria-label") or attrs["id"] in labelled or attrs["id"] == "play"  # its text is its name


@pytest.mark.slow
def test_a_browser_shows_the_step_of_the_sample_that_the_address_names(browser, document, tmp_path):
    write_trace(document, tmp_path / "trace.html")
    sample = document["samples"][0]
    first, wrong = sample["num_prompt_tokens"], document["vocabulary"]["40"]

    def browse(fragment: str) -> tuple[list[set[str]], list[str], dict[str, str]]:
        """Return the classes and the texts of the tokens, and the texts of the elements with an id."""
        page = Page(browser(f"{(tmp_path / 'trace.html').as_uri()}#{fragment}")[0])
        found = [(attrs, "".join(texts)) for _, attrs, texts in page.elements]
        tokens = [(set(attrs["class"].split()), text) for attrs, text in found if "data-position" in attrs]
        classes, texts = map(list, zip(*tokens, strict=True))
        return classes, texts, {attrs["id"]: text for attrs, text in found if "id" in attrs}

    classes, _, shown = browse("")
    assert shown["where"] == f"step {sample['opening']} of {len(sample['steps'])}"
    assert {"masked" in kinds for kinds in classes[first:]} == {True, False}

    classes, texts, shown = browse("sample=0&step=0")
    assert "".join(texts[:first]) == "The quick" and all("masked" in kinds for kinds in classes[first:])
    assert shown["where"] == f"step 0 of {len(sample['steps'])}"

    classes, texts, shown = browse("sample=0&step=1")
    assert (classes[first], texts[first]) == ({"token", "revealed"}, wrong)
    assert shown["happened"] == f"Block 1 of {len(sample['blocks'])}: “{wrong}” at 25 %"

    classes, _, shown = browse("sample=0&step=2")
    assert classes[first] == {"token", "masked", "taken"}
    assert shown["happened"].endswith(f"back to mask “{wrong}”")

    _, texts, shown = browse("sample=0&step=last")
    assert "".join(texts).replace("↵", "") == "The quick" + TEXT
    assert shown["where"] == "step {0} of {0}".format(len(sample["steps"]))

    _, texts, shown = browse("sample=1&step=last")
    assert "".join(texts) == "A block is written."
    assert f"tokens per forward{document['samples'][1]['tokens_per_forward']:.2f}" in shown["facts"]
