"""The report of a made-up run folder (fixtures/made_up_run.py), finished and not."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignvlm.errors import UserError
from alignvlm.report.charts import Chart, Series, draw, format_duration, format_number
from alignvlm.report.report import build_report
from alignvlm.report.run_data import quarantine_summary, read_run
from alignvlm.run_folder import RunFolder, checkpoint_folder

VOID = {"meta", "img", "br", "link", "input", "hr"}
SVG_VOID = {"line", "circle", "polyline", "rect", "image"}


class Page(HTMLParser):
    """Collects elements; every tag must be closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, int] = {}
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_VOID | VOID
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_recomputation_that_was_chosen_is_a_fact(run_folder: Path) -> None:
    stages = read_run(run_folder).stages
    stages[1].folder.recomputation.write_text('{"vision": 0, "language": 4, "circumstances": {}}')
    stages[2].folder.recomputation.write_text('{"vision": true}')  # damaged
    assert f"{stages[1].name}: vision none, language one in 4<" in build_report(run_folder).read_text(encoding="utf-8")


def test_page_is_whole_and_needs_nothing_else(run_folder: Path) -> None:
    html = build_report(run_folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "@import" not in html
    assert "url(" not in html
    assert page.found["table"] >= 2
    assert html.count('class="chart"') == 10
    assert page.found["img"] == 7
    assert html.count('class="overlay"') == 4
    text = " ".join(page.text)
    assert "Resumes 1" in text
    assert "Best checkpoint" not in text
    for word in (
        "held-out loss",
        "Training loss by source",
        "Held-out loss by source",
        "finished",
        "4f1c2d3e5a",
        "2.13.0",
        "image # is truncated",
        "<|x|>&",
    ):
        assert word in text


def test_results_json_has_the_fixed_names(run_folder: Path) -> None:
    results = json.loads((build_report(run_folder).parent / "results.json").read_text())
    assert list(results["stages"]) == ["init", "connector", "joint", "instruct"]
    for tasks in results["stages"].values():
        assert list(tasks) == ["fields", "tables"]
        for entry in tasks.values():
            assert {"exact_match", "anls", "relaxed_accuracy", "items", "baseline"} <= set(entry)
            assert all(0 <= entry[k] <= 1 for k in ("exact_match", "anls", "relaxed_accuracy", "baseline"))
    assert results["stages"]["instruct"]["fields"]["items"] == 40


def test_page_shows_the_same_numbers(run_folder: Path) -> None:
    path = build_report(run_folder)
    results = json.loads((path.parent / "results.json").read_text())
    text = Page(path.read_text(encoding="utf-8")).text
    for tasks in results["stages"].values():
        for entry in tasks.values():
            assert f"{100 * entry['exact_match']:.1f}" in text


def test_perplexity_of_every_stage_is_on_the_page_and_in_the_results(run_folder: Path) -> None:
    entry = {"bits_per_byte": 1.5, "word_perplexity": 40.5, "documents": 3, "tokens": 90}
    for number, name in enumerate(("init", "joint")):
        folder = run_folder / f"{2 * number}-{name}" / "evaluation"
        texts = {"wiki": {"perplexity": 12.25 + number} | entry}
        (folder / "text.json").write_text(json.dumps({"model": "m", "texts": texts}))
    path = build_report(run_folder)
    text = " ".join(Page(path.read_text(encoding="utf-8")).text)
    assert "Language model on held-out text" in text
    assert "12.2" in text
    assert "13.2" in text
    results = json.loads((path.parent / "results.json").read_text())
    assert {stage: texts["wiki"]["perplexity"] for stage, texts in results["texts"].items()} == {
        "init": 12.25, "joint": 13.25,
    }  # fmt: skip


def test_unfinished_run_gives_a_page_too(unfinished_run: Path) -> None:
    page = Page(build_report(unfinished_run).read_text(encoding="utf-8"))
    assert "in progress" in page.text
    for name in ("metrics.jsonl", "environment.json", "quarantine.jsonl"):
        (unfinished_run / name).unlink()
    shutil.rmtree(unfinished_run / "1-connector")
    shutil.rmtree(unfinished_run / "0-init" / "evaluation")
    assert "No samples were skipped." in Page(build_report(unfinished_run).read_text(encoding="utf-8")).text


def test_steps_repeated_after_a_resume_count_once(run_folder: Path) -> None:
    before = read_run(run_folder).steps
    repeated = {**before[5], "loss": 123.0}
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(repeated) + "\n")
    after = read_run(run_folder).steps
    assert len(after) == len(before)
    assert after[5]["loss"] == 123.0
    assert [(s["stage"], s["step"]) for s in after] == [(s["stage"], s["step"]) for s in before]


def test_quarantine_is_summed_up_by_kind(run_folder: Path) -> None:
    assert quarantine_summary(read_run(run_folder).quarantine) == [
        ("fields", "image # is truncated", 3, "fields-0"),
    ]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        build_report(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a run folder"):
        build_report(tmp_path)


def test_charts_keep_long_runs_small_and_skip_what_is_not_there() -> None:
    steps = [{"stage": "a" if i < 4000 else "b", "step": i + 1, "loss": 2.0 + i % 2, "late": None} for i in range(9000)]
    loss = Series("loss", 0, lambda step: step["loss"])
    svg = draw(Chart("Loss", [loss]), steps)
    assert svg is not None
    assert svg.count("<polyline") == 2
    assert svg.count(",") < 4000
    few = Series("few", 1, lambda step: step["step"] if step["step"] % 200 == 0 else None, exact=True)
    svg = draw(Chart("Few", [few], smooth=True), steps)
    assert svg is not None
    drawn = json.loads(svg.split('application/json">')[1].split("</script>")[0])["series"][0][2]
    assert drawn == [[step, step] for step in range(200, 9001, 200)]
    assert "raw" not in svg
    assert draw(Chart("Late", [Series("late", 0, lambda step: step["late"])]), steps) is None
    assert draw(Chart("Nothing", [loss]), []) is None
    bad = [{"stage": "a", "step": step, "loss": loss} for step, loss in enumerate((float("nan"), None, 0.0), 1)]
    assert draw(Chart("Bad", [loss], log=True), bad) is None  # a logarithmic axis has no place for NaN and 0
    flat = draw(Chart("Flat", [loss]), bad)
    assert flat is not None
    assert flat.count("<circle") == 1
    assert "nan" not in flat


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3e-5, "3.0e-5"), (0.002, "0.002"), (12.5, "12.5"), (1234, "1.23K"), (8.1e6, "8.1M")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_durations() -> None:
    assert [format_duration(s) for s in (9.6, 65, 11520)] == ["10 s", "1 min 05 s", "3 h 12 min"]


def test_the_head_names_the_best_checkpoint_and_an_early_end(run_folder: Path, tmp_path: Path) -> None:
    run = RunFolder(run_folder)
    with run.config.open("a") as config:
        config.write("checkpoint: {keep_best: loss/held_out}\n")
    with run.attempts.open("a") as attempts:
        attempts.write('{"stage": "joint", "resumed_at": 0, "ended_early": "step 60: no better"}\n')
    for step, loss in ((1000, 1.25), (2000, 1.5), (3000, 0.5)):
        folder = checkpoint_folder(run.stage(2, "joint").checkpoints, step)
        folder.mkdir(parents=True)
        state = json.dumps({"step": step, "num_steps": 3000, "scores": {"loss/held_out": loss}})
        (tmp_path / f"{step}.json").write_text(state)
        if step < 3000:
            (folder / "state.json").write_text(state)
        else:  # a link that leads out of the run is not read
            (folder / "state.json").symlink_to(tmp_path / f"{step}.json")
    text = " ".join(Page(build_report(run_folder).read_text()).text)
    assert "Best checkpoint joint, step 1,000: loss/held_out 1.25" in " ".join(text.split())
    assert "Early end joint, step 60: no better" in " ".join(text.split())
