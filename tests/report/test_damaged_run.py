"""A run whose files are damaged or come from somebody else: report and next start read what can be read, no more."""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from alignvlm.config import load_recipe, recipe_to_yaml
from alignvlm.errors import UserError
from alignvlm.evaluation.evaluate import read_results
from alignvlm.report.report import build_report
from alignvlm.run_folder import METRICS_LINE, Run, RunFolder
from alignvlm.training.callbacks.metrics_log import keep_until
from data_pipeline.errors import DataError
from data_pipeline.files import read_json_lines
from data_pipeline.loading.ledger import Ledger
from data_pipeline.shards.sources import BadSample
from tests.fixtures.damage import DAMAGES
from tests.fixtures.made_up_run import write_run
from tests.jobs import TINY


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run."""
    return write_run(tmp_path_factory.mktemp("runs") / "demo", stages=("init", "connector"), steps_per_stage=3)


@pytest.fixture
def run(written: Path, tmp_path: Path) -> RunFolder:
    """A copy to damage."""
    shutil.copytree(written, tmp_path / "runs" / "demo")
    return RunFolder(tmp_path / "runs" / "demo")


def reported_files(run: RunFolder) -> list[list[Path]]:
    """Every file that the report reads, one of each kind; the damage to those of one list hides none of the others."""
    connector = run.stage(1, "connector").evaluation
    return [
        [run.environment, run.metrics, run.attempts, run.quarantine, connector.results],
        [connector.predictions("fields"), connector.view("fields", 0), connector.picture("fields", 10, 0)],
        [connector.picture("fields", 0, 0), connector.view("tables", 0)],
    ]


@pytest.mark.parametrize("damage", [*DAMAGES, "missing", "a folder"])
def test_the_report_shows_what_can_be_read(run: RunFolder, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for paths in reported_files(run):
        whole = [path.read_bytes() for path in paths]
        for path, data in zip(paths, whole, strict=True):
            path.unlink()
            if damage == "a folder":
                path.mkdir()
            elif damage == "wrong types" and path.suffix == ".png":
                path.write_bytes(data)
            elif damage != "missing":
                path.write_bytes(DAMAGES[damage](data))
        caplog.clear()
        assert "</html>" in build_report(run.path).read_text(encoding="utf-8")
        assert not [message for message in caplog.messages if "\n" in message]
        if damage in ("garbage", "a list", "a number"):
            assert [str(path) in caplog.text for path in paths] == [True] * len(paths)
        for path, data in zip(paths, whole, strict=True):
            if damage == "a folder":
                path.rmdir()
            path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recipe_is_one_line(run: RunFolder, damage: str) -> None:
    text = b"name: demo\nseed: [1, 2,\n" if damage == "cut" else DAMAGES[damage](b'{"name": "demo"}')
    run.config.write_bytes(text)
    if damage in ("other keys", "wrong types"):
        assert build_report(run.path).is_file()
        return
    with pytest.raises(UserError) as caught:
        build_report(run.path)
    assert str(caught.value).startswith(str(run.config))
    assert "restore it" in str(caught.value)
    assert "\n" not in str(caught.value)
    recipe = replace(load_recipe(str(TINY)), runs=str(run.path.parent), name="demo")
    with pytest.raises(UserError, match="restore it"):
        Run(recipe).open()


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_start_reads_what_can_be_read(run: RunFolder, damage: str) -> None:
    recipe = replace(load_recipe(str(TINY)), runs=str(run.path.parent), name="demo")
    run.config.write_text(recipe_to_yaml(recipe))
    metrics = run.metrics.read_bytes()
    for path in (run.environment, run.metrics, run.attempts, run.quarantine):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    results = run.stage(1, "connector").evaluation
    results.results.write_bytes(DAMAGES[damage](results.results.read_bytes()))
    Run(recipe).open()
    assert json.loads(run.environment.read_text())["python"]
    keep_until(run.metrics, run.lost_steps, "connector", 2)
    kept = run.metrics.read_bytes()
    assert set(kept.splitlines()) <= set(metrics.splitlines()[:2])
    assert read_json_lines(run.metrics, METRICS_LINE) == [json.loads(line) for line in kept.splitlines()]
    assert read_results(results) == {}
    Ledger(run.quarantine, 1.0).record(1, [BadSample("new", "0.tar", "k", "broken")])
    assert read_json_lines(run.quarantine)[-1]["source"] == "new"


def test_a_missing_environment_is_written_and_a_good_one_stays(tmp_path: Path) -> None:
    run = Run(replace(load_recipe(str(TINY)), runs=str(tmp_path)))
    run.open()
    first = run.folder.environment.read_bytes()
    run.open()
    assert run.folder.environment.read_bytes() == first


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(DataError, match=r"runs/tiny cannot be written \(Not a directory\); .* runs=FOLDER"):
        Run(replace(load_recipe(str(TINY)), runs=str(tmp_path / "runs"))).open()


SECRET = b"the secret of another folder"


def absolute_path(run: RunFolder, outside: Path) -> None:
    name_images(run, [str(outside / "picture.png"), str(outside / "secret.txt")])


def relative_path(run: RunFolder, outside: Path) -> None:
    name_images(run, ["../../../../outside/picture.png", "../../../../outside/secret.txt", "/dev/zero", "a\0b"])


def linked_picture(run: RunFolder, outside: Path) -> None:
    evaluation = run.stage(1, "connector").evaluation
    replace_by_link(evaluation.picture("fields", 10, 0), outside / "picture.png")


def linked_gallery(run: RunFolder, outside: Path) -> None:
    gallery = run.stage(1, "connector").evaluation.gallery
    shutil.copytree(gallery, outside / "gallery")
    (outside / "picture.png").replace(outside / "gallery" / "fields-000010-0.png")
    shutil.rmtree(gallery)
    gallery.symlink_to(outside / "gallery")


def linked_stage(run: RunFolder, outside: Path) -> None:
    run.stage(1, "connector").path.rename(outside / "stage")
    linked = outside / "stage" / "evaluation" / "gallery" / "fields-000010-0.png"
    (outside / "picture.png").replace(linked)
    run.stage(1, "connector").path.symlink_to(outside / "stage")


def linked_texts(run: RunFolder, outside: Path) -> None:
    row = {"source": SECRET.decode(), "shard": "s", "key": "k", "error": SECRET.decode()}
    (outside / "rows.jsonl").write_text(json.dumps(row) + "\n")
    replace_by_link(run.quarantine, outside / "rows.jsonl")
    (outside / "environment.json").write_text(json.dumps({"packages": {"torch": SECRET.decode()}}))
    replace_by_link(run.environment, outside / "environment.json")
    (outside / "config.yaml").write_text(f"name: {SECRET.decode()}")
    replace_by_link(run.config, outside / "config.yaml")


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def name_images(run: RunFolder, images: list[str]) -> None:
    predictions = run.stage(1, "connector").evaluation.predictions("fields")
    rows = [row | {"images": images} if "images" in row else row for row in read_json_lines(predictions)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "plant", [absolute_path, relative_path, linked_picture, linked_gallery, linked_stage, linked_texts]
)
def test_a_report_holds_nothing_from_outside_the_run(
    run: RunFolder, tmp_path: Path, plant: Callable[[RunFolder, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (7, 5), (1, 2, 3)).save(outside / "picture.png")
    (outside / "secret.txt").write_bytes(SECRET)
    picture = base64.b64encode((outside / "picture.png").read_bytes()).decode()
    plant(run, outside)
    with caplog.at_level(logging.WARNING):
        page = build_report(run.path).read_text(encoding="utf-8")
    assert picture not in page
    assert SECRET.decode() not in page
    assert base64.b64encode(SECRET).decode()[:-4] not in page
    assert "leads out of the run folder and is left out" in caplog.text


def test_a_report_is_written_nowhere_else(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    run.report.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"report cannot be written .*leads out of the run folder"):
        build_report(run.path)
    assert list((tmp_path / "outside").iterdir()) == []


def test_stages_without_a_recipe_are_refused(tmp_path: Path) -> None:
    """What a job leaves that still saves while its folder is removed."""
    run = Run(load_recipe(str(TINY), [f"runs={tmp_path}"]))
    checkpoints = run.folder.path / "1-connector" / "checkpoints"
    checkpoints.mkdir(parents=True)
    run.open()
    run.folder.config.unlink()
    (checkpoints / "step-00000002").mkdir()
    (checkpoints / "step-00000002" / "manifest.json").touch()
    with pytest.raises(UserError, match=r"config\.yaml is missing, .* recipe \S*/1-connector was made: restore it"):
        run.open()
    assert not run.folder.config.exists()
