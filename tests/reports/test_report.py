"""A report is one complete, harmless and reproducible page with everything that its files contain."""

import json
import re
import sys

import pytest
from html_page import Page

from bd3lm_hf.cli import run_verb
from bd3lm_hf.reports import figures
from bd3lm_hf.reports.report import Cell, Column, draw, page, table, write_report
from bd3lm_hf.reports.run_reader import read_material


PNG = b"\x89PNG"
HARMFUL = "</pre><script>alert(1)</script>&amp; @TITLE@ <!-- $x$"


def write_run(folder, *, perplexity=20.0, text=HARMFUL, dataset="python-docs", model_type="bd3lm"):
    """A finished run with everything that a run can write."""
    folder.mkdir(parents=True)
    log: list[dict] = []
    for step in (10, 20, 30):
        log.append({"loss": 4 - step / 20, "tokens_per_second": 5000.0 + step, "step": step})
        log.append({"eval_nll": 3.5 - step / 50, "eval_standard_error": 0.1, "step": step})
        log.append({"interval_min": 0.5, "interval_max": 1.0, "step": step})
    score = {"perplexity": perplexity, "nll": 3.0, "standard_error": 0.1, "bits_per_byte": 1.5}
    score |= {"num_tokens": 4096, "num_sequences": 32}
    results = {"losses": log, "after": score, "unigram_perplexity": 100.0, "text": text, "seed": 7, "steps": 30}
    results |= {"seconds": 12.3, "versions": {"torch": "2.13.0"}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    recipe = f"dataset: {dataset}\nlearning_rate: {perplexity}\nfinal_estimator: exact\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    config = {"model_type": model_type} | ({"block_size": 4} if model_type == "bd3lm" else {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    candidates = [
        {"interval": [low, low + width], "variance": 3.0 - low + step / 30 - width, "standard_error": None}
        for step, low, width in ((10, 0.001, 0.999), (10, 0.1, 0.5), (10, 0.5, 0.5))
    ]
    searches = [{"step": step, "interval": [0.5, 1.0], "candidates": candidates} for step in (10, 20)]
    (folder / "interval_search.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in searches), "utf-8")
    (folder / "samples.txt").write_text("--- sample at step 10 ---\nearly words\n", encoding="utf-8")
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def point(sampler: str, setting: dict, speed: float, perplexity: float) -> dict:
    found = {"tokens_per_forward": speed, "perplexity": perplexity, "standard_error": 0.02, "entropy": 3.0}
    return {"sampler": sampler, "setting": setting, **found}


EVALUATION = {"model": "models/tiny", "dataset": "wikitext", "split": "test", "seed": 3, "num_samples": 4}
EVALUATION |= {"suite": None}  # as `bd3lm eval` writes it
EVALUATION |= {"estimator": "stratified", "nll": 3.2, "perplexity": 24.5, "standard_error": 0.01, "num_tokens": 1000}
EVALUATION |= {"num_sequences": 50, "bits_per_byte": None, "data_sha256": "0123456789abcdef"}
QUALITY = {
    "judge": "gpt2",
    "points": [
        point("first_hitting", {"num_denoising_steps": None}, 1.0, 30.0),
        point("confidence", {"confidence_threshold": 0.5}, 2.5, 36.0),
    ],
}


def page_of(*paths) -> Page:
    material = read_material(paths)
    return Page(page(material, draw(material)))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder of a report of two runs."""
    folder = tmp_path_factory.mktemp("reported")
    runs = [write_run(folder / "one", perplexity=20.0), write_run(folder / "two", perplexity=25.0)]
    write_report(runs, folder / "report.html")
    return folder


def test_a_page_of_runs_holds_their_numbers_curves_and_samples(reported):
    shown = Page((reported / "report.html").read_text(encoding="utf-8"))
    text = ["python-docs (validation split)", "exact bound"]
    scored = [*text, "≤\xa025.00 ± 2.50", "3.0000 ± 0.1000", "1.5000", "32", "4,096", "100.0"]
    assert shown.row("two") == ["two", *scored]
    assert shown.row("one")[3] == "★ ≤\xa020.00 ± 2.00"
    assert (
        "The lowest perplexity on held-out text is at most 20.0 (one: exact bound, python-docs (validation split)), "
        "5.0 times below"
    ) in shown.text
    assert "during training: python-docs (validation split), stratified estimate of the bound" in shown.text
    assert shown.row("learning_rate") == ["learning_rate", "20.0", "25.0"]
    assert "early words" in shown.text
    assert shown.tags.count("svg") == 6  # loss, held-out, speed, interval, and the variances of each run
    for title in ("loss (nats per token)", "optimizer steps", "tokens per second", "mask rate (share", "nats²"):
        assert title in shown.text
    names = ["held-out", "interval", "speed", "training-loss", "variance-1", "variance-2"]
    pictures = sorted(reported.glob("*.png"))
    assert [picture.name for picture in pictures] == [f"report-{name}.png" for name in names]
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)


def test_a_perplexity_is_marked_as_a_bound_unless_it_is_exact(tmp_path):
    shown = page_of(write_run(tmp_path / "exact", model_type="ar"))
    assert shown.row("exact")[3] == "20.00 ± 2.00"
    assert "The perplexity on held-out text is 20.0 (exact: exact likelihood, python-docs" in shown.text


def test_the_page_needs_nothing_else_and_no_text_of_a_file_becomes_a_part_of_it(tmp_path):
    shown = page_of(write_run(tmp_path / "<b>run & co", dataset="'<i>'"))
    assert not {"script", "link", "iframe", "img", "b-"} & set(shown.tags)
    assert "i" not in shown.tags
    links = [
        value
        for _, attrs, _ in shown.elements
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert all(re.match("#|data:", link) for link in links)
    assert HARMFUL in shown.text  # as text, without evaluating the template field in it


def test_two_reports_of_equal_files_are_equal_byte_by_byte(reported, tmp_path):
    write_report([reported / "one", reported / "two"], tmp_path / "report.html")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    assert all(file.read_bytes() == (reported / file.name).read_bytes() for file in files)


def test_a_page_of_an_evaluation_has_its_row_and_its_origin(tmp_path):
    shown = page_of(write_json(tmp_path / "eval.json", EVALUATION))
    text = ["wikitext (test split)", "stratified estimate of the bound, 4 noise samples"]
    assert shown.row("tiny") == ["tiny", *text, "≤\xa024.50 ± 0.24", "3.2000 ± 0.0100", "50", "1,000"]
    assert shown.row("tiny on wikitext") == ["tiny on wikitext", "3", "0123456789ab"]
    assert "svg" not in shown.tags


def test_an_exact_result_of_a_suite_has_no_sign_and_competes_within_its_dataset(tmp_path):
    rows = [{**EVALUATION, "bound": False}, {**EVALUATION, "dataset": "ptb", "perplexity": 90.0}]
    rows.append({**EVALUATION, "model": "other", "perplexity": None, "nll": None})
    shown = page_of(write_json(tmp_path / "suite.json", {"suite": "zero-shot", "results": rows}))
    assert [row[3] for row in shown.rows if row[0] in ("tiny", "other")] == ["24.50 ± 0.24", "≤\xa090.00 ± 0.90", "–"]


def test_quality_comparison_written_texts_and_samples_have_sections(tmp_path):
    compared = {"seed": 1, "perplexity": 30.0, "exact": True, "generative_perplexity": 20.0, "seconds_per_token": 0.01}
    judged = {"model": "m/writer", "judge": "gpt2", "generative_perplexity": 40.0, "standard_error": 0.05}
    judged |= {"distinct_2": 0.5, "entropy": 3.1}
    lines = "".join(json.dumps({"index": index, "text": f"text {index}"}) + "\n" for index in range(12))
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    shown = page_of(
        write_json(tmp_path / "quality.json", QUALITY),
        write_json(
            tmp_path / "comparison.json", [{"model": "a", **compared}, {**dict.fromkeys(compared, 50.0), "model": "b"}]
        ),
        write_json(tmp_path / "generative.json", judged),
        tmp_path / "samples.jsonl",
    )
    row = ["confidence", "confidence_threshold 0.5", "★ 2.50", "36.00 ± 0.72", "3.000"]
    assert shown.row("confidence") == row
    assert shown.row("a")[2:] == ["★ 30.00", "★ 20.00", "★ 10.00"]
    assert shown.row("writer")[:3] == ["writer", "gpt2", "40.00 ± 2.00"]
    assert "text 11" in shown.text
    assert "text 3\n" not in shown.text
    assert "4 more are not shown." in shown.text
    assert "tokens per forward pass" in shown.text


def test_the_page_names_what_a_run_lacks(tmp_path):
    run = write_run(tmp_path / "killed")
    (run / "results.json").unlink()
    shown = page_of(run)
    assert "killed: results.json is missing" in shown.text
    assert "the star marks the chosen one" in shown.text  # what exists is shown


def test_losses_that_are_not_finite_and_single_points_are_drawn(tmp_path):
    run = write_run(tmp_path / "_hidden $run")
    results = {"losses": [{"loss": float("nan"), "step": 1}, {"loss": 2.0, "step": 2}], "after": None}
    write_json(run / "results.json", results)
    shown = page_of(run)
    assert " _hidden $run" in shown.text
    assert "loss (nats per token)" in shown.text


def test_the_best_of_each_group_is_marked_and_of_one_alone_none():
    records = [{"name": n, "value": v, "group": g} for n, v, g in (("a", 2.0, "x"), ("b", 1.0, "x"), ("c", 0.5, "y"))]
    columns = [Column("name", "name"), Column("value", "value", ".1f", min), Column("empty", "nothing")]
    made = table(columns, records, group="group")
    assert made.columns == [("name", False), ("value", True)]
    assert [row[1] for row in made.rows] == [Cell("2.0", 2.0), Cell("1.0", 1.0, is_best=True), Cell("0.5", 0.5)]


def test_the_colours_of_figures_have_counterparts_for_dark_pages(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    drawn, style = text[text.index("<main>") :], text[: text.index("</style>")]
    for colour, variable in figures.VARIABLES.items():
        assert colour not in drawn
        assert f"--{variable}: light-dark({colour}, #" in style


def test_bad_output_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"--output .*nowhere.report\.html: .*nowhere"):
        write_report([tmp_path / "missing"], tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match=r"--output .*report\.pdf: a report is an HTML page"):
        write_report([tmp_path / "missing"], tmp_path / "report.pdf")


def test_without_matplotlib_one_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib: pip install 'bd3lm-hf\[plots\]'"):
        write_report([tmp_path / "missing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_the_page_and_says_where(tmp_path, capsys):
    quality = write_json(tmp_path / "quality.json", QUALITY)
    run_verb("report", [str(quality), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}, and 1 figure as page-*.png\n"
    assert (tmp_path / "page-quality-1.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_browser_shows_the_page_without_complaint(reported, browser):
    shown, messages = browser((reported / "report.html").as_uri())
    assert "CONSOLE" not in messages and "Training loss" in shown


@pytest.mark.parametrize(
    "content",
    [
        {"judge": "gpt2", "points": 3},
        {"judge": "gpt2", "points": [1, "x"]},
        {"suite": "zero-shot", "results": [{"dataset": 1}]},
        {"suite": "zero-shot", "results": None},
        {"dataset": "x", "perplexity": "high", "nll": None},
        {"generative_perplexity": []},
    ],
)
def test_results_with_fields_of_another_type_are_refused_and_the_old_page_stays(bd3lm, tmp_path, content):
    (tmp_path / "bad.json").write_text(json.dumps(content))
    (tmp_path / "page.html").write_text('<!doctype html><meta name="generator" content="bd3lm_hf">')
    before = (tmp_path / "page.html").read_text()
    code, _, err = bd3lm("report", tmp_path / "bad.json", "--output", tmp_path / "page.html")
    if code == 2:
        assert "bad.json" in err and err.count("\n") == 1 and (tmp_path / "page.html").read_text() == before
    else:
        assert (code, err) == (0, "")
