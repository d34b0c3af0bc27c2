"""The report of a made-up run in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from alignvlm.report.report import build_report
from data_pipeline.files import read_json_lines, write_json_lines
from tests.fixtures.browser import OpenPage

pytestmark = pytest.mark.browser
MARKUP = '<img src=x onerror="document.title=1"></td><script>document.title=2</script>'


def test_tables_are_sorted_by_a_column_and_back(run_folder: Path, open_page: OpenPage) -> None:
    page = open_page(build_report(run_folder).as_uri())
    results = json.loads((run_folder / "report" / "results.json").read_text())["stages"]["instruct"]
    by_score = sorted(results, key=lambda task: results[task]["exact_match"])
    tasks = page.locator("#results tbody th")
    before = tasks.all_inner_texts()
    assert sorted(before) == sorted(by_score)
    title = page.get_by_role("columnheader", name="Exact match")
    for order in (by_score[::-1], by_score, before):
        title.get_by_role("button").press("Enter")
        assert tasks.all_inner_texts() == order
    assert title.get_attribute("aria-sort") is None


def test_rows_are_sorted_as_numbers_and_the_stages_of_a_task_stay_together(
    run_folder: Path, open_page: OpenPage
) -> None:
    page = open_page(build_report(run_folder).as_uri())
    rows = page.locator("#results tbody")
    for title in ("Task", "Baseline"):
        page.get_by_role("columnheader", name=title).get_by_role("button").click()
        assert [group.split()[1::6][0] for group in rows.all_inner_texts()] == ["init", "init"]
    quarantine = page.locator("#data table")
    assert quarantine.get_by_role("button").count() == 0, "one row needs no order"


def test_a_chart_tells_its_values_under_the_pointer(run_folder: Path, open_page: OpenPage) -> None:
    page = open_page(build_report(run_folder).as_uri())
    chart = page.locator(".chart").first
    tip = chart.locator(".tip")
    assert not tip.is_visible()
    chart.locator("svg").hover()
    tip.wait_for()
    stage, *values = tip.inner_text().splitlines()
    assert stage.startswith(("connector", "joint", "instruct"))
    assert values[0].startswith("loss")
    page.locator("h1").hover()
    tip.wait_for(state="hidden")


def test_markup_in_questions_and_answers_stays_text(run_folder: Path, open_page: OpenPage) -> None:
    for path in run_folder.glob("*/evaluation/*.jsonl"):
        rows = [row | {"question": MARKUP, "prediction": MARKUP, "answers": [MARKUP]} for row in read_json_lines(path)]
        write_json_lines(path, rows)
    for path in run_folder.glob("*/evaluation/gallery/*.json"):
        path.write_text(path.read_text().replace('"\\u2423the"', json.dumps(MARKUP)))
    config = run_folder / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"description": MARKUP}))
    page = open_page(build_report(run_folder).as_uri())
    assert page.title().startswith("demo")
    for place in (".question", "header .lead"):
        assert page.locator(place).first.inner_text() == MARKUP
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("body script:not([type])").count() == 1
