"""The page, results.json and table.md of made-up records: the numbers by hand, text escaped, nothing loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignvlm.config import load_recipe
from alignvlm.report.charts import PALETTE
from alignvlm.resources import resource
from alignvlm.studies.cells.batches import StageBatches
from alignvlm.studies.connectors import STUDY
from alignvlm.studies.registry import find_study
from alignvlm.studies.results.page import write_page
from alignvlm.studies.results.records import Results
from alignvlm.studies.results.tables import Section, Table, markdown
from tests.report.test_report import Page
from tests.studies.made_up import made_up_results


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up_results(STUDY, missing=("tiny-mlp-seed8",))


def batches_of(results: Results) -> dict[str, dict[str, StageBatches]]:
    """Those of the perceiver are fitted; all others are the reference's."""
    return {
        cell.name: {
            "connector": StageBatches(f"plan {cell.seed}", 8, 300, 192)
            if cell.variant.name != "perceiver"
            else StageBatches(f"other {cell.seed}", 8, 299, 120)
        }
        for cell in results.grid.cells
    }


def test_numbers_are_the_same_everywhere(results: Results, tmp_path: Path) -> None:
    path = write_page(STUDY, results, batches_of(results), tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    content = json.loads((path.parent / "results.json").read_text(encoding="utf-8"))
    assert content["finished"] is False
    variants = [variant.name for variant in results.grid.variants]
    assert list(content["variants"]) == variants
    count = len(variants)
    ovis = content["variants"]["ovis"]["scores"]["test"]
    position = variants.index("ovis")
    values = np.array([0.5 + (position + seed * count) / 100 for seed in (0, 1)])
    assert ovis["mean"]["mean"] == pytest.approx(values.mean())
    assert ovis["mean"]["error"] == pytest.approx(values.std(ddof=1) / np.sqrt(2))
    assert ovis["difference"]["mean"] == pytest.approx(position / 100)
    assert ovis["difference"]["error"] == pytest.approx(0, abs=1e-12)
    assert content["variants"]["align"]["scores"]["test"]["difference"] is None
    assert content["variants"]["mlp"]["scores"]["test"]["mean"]["count"] == 1
    shown = f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) / np.sqrt(2):.1f}"
    assert shown in page.text
    assert f"| ovis | {shown} | 2 |" in (path.parent / "table.md").read_text(encoding="utf-8")
    text = " ".join(page.text)
    assert f"{len(results.records)} of {len(results.grid.cells)} runs" in text
    assert "192 → 120 tokens per pack, 299 of 300 samples" in text
    same = next(line for line in page.text if line.startswith("Same samples in the same packs"))
    assert "mlp, ovis" in same
    assert "perceiver" not in same
    assert "71.43" in text  # the published row of ALIGN


def test_page_needs_nothing_else_and_escapes_what_it_shows(results: Results, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|`x`"
    first = results.records[0]
    changed = replace(first, scores={evil: 0.5}, titles={evil: evil})
    path = write_page(STUDY, Results(results.grid, [changed, *results.records[1:]]), {}, tmp_path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert "alert(1)</script>" not in html
    assert html.count('class="chart"') == 2  # loss and entropy; nothing measured the others
    assert html.count("<script") == 3
    table = (path.parent / "table.md").read_text(encoding="utf-8")
    assert "<script>" not in table
    assert "&lt;script>alert(1)&lt;/script>\\|" in table
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert all(row.endswith(" |") for row in rows)


def test_a_missing_score_is_no_part_of_an_average(results: Results, tmp_path: Path) -> None:
    """The evaluation of one run crashed before its second task."""
    records = [replace(record, scores={**record.scores, "late": 0.9}) for record in results.records]
    records[0] = replace(records[0], scores={"test": 0.5})
    cells = {record.cell.name for record in records}
    whole = replace(results.grid, cells=[cell for cell in results.grid.cells if cell.name in cells])
    content = json.loads((write_page(STUDY, Results(whole, records), {}, tmp_path).parent / "results.json").read_text())
    assert content["finished"] is False
    second = next(record for record in records[1:] if record.cell.variant.name == "align")
    average = content["variants"]["align"]["average"]["mean"]
    assert (average["count"], average["mean"]) == (1, pytest.approx((second.scores["test"] + 0.9) / 2))


def test_the_page_names_the_devices_that_trained(results: Results, tmp_path: Path) -> None:
    devices = ["a GPU", "a GPU", "a processor", None]
    records = [replace(record, device=device) for record, device in zip(results.records, devices, strict=False)]
    page = write_page(STUDY, Results(results.grid, records), {}, tmp_path)
    assert "Trained on a GPU (2), a processor (1)." in page.read_text()
    variants = json.loads((tmp_path / "results.json").read_text())["variants"].values()
    cells = [cell for each in variants for cell in each["cells"]]
    assert sorted(cell["device"] for cell in cells if cell["device"]) == ["a GPU", "a GPU", "a processor"]


def test_a_page_has_no_password_and_a_command_for_the_shell(results: Results, tmp_path: Path) -> None:
    overrides = ("tracking.uri=postgresql://me:secret@host/db", "description=two words")
    grid = replace(results.grid, overrides=overrides)
    path = write_page(STUDY, Results(grid, results.records), {}, tmp_path)
    assert all("secret" not in file.read_text(encoding="utf-8") for file in tmp_path.iterdir())
    assert "'description=two words'" in " ".join(Page(path.read_text(encoding="utf-8")).text)


def test_every_colour_of_a_chart_is_in_the_style_sheet() -> None:
    style = resource("templates").joinpath("report.css").read_text(encoding="utf-8")
    for number in range(PALETTE):
        assert f".c{number} {{ --c: var(--c{number}); }}" in style
        assert style.count(f"--c{number}: #") == 2  # light and dark
    assert len(find_study("init").variants(load_recipe("quickstart", ["model.connector.gain=3"]))) <= PALETTE


def test_a_study_without_a_trained_run_says_so(results: Results, tmp_path: Path) -> None:
    path = write_page(STUDY, Results(results.grid, []), {}, tmp_path)
    assert "No run of this study is finished yet." in Page(path.read_text(encoding="utf-8")).text


def test_markdown_has_every_table() -> None:
    text = markdown("T", [Section("One", "lead", [Table(("a", "b"), [("x", "1"), ("y", "2")])], notes=["note"])])
    assert text == "# T\n\n## One\n\nlead\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n\n- note\n"
