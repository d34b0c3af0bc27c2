"""A whole run through the command line: every file of a run's folder, resume by real kills, refusals in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from alignvlm.parts import part_of
from alignvlm.report.goodput import read_goodput
from data_pipeline.files import read_json_lines
from data_pipeline.stores import helper
from tests.jobs import ROOT, TINY, curve, kill, kill_launcher, metrics, run, start, wait_for_step, weights
from tests.stores import real
from tests.stores.faults import Faults
from tests.stores.servers import proxy

STAGES = ["connector"] * 8 + ["instruct"] * 4


HELD_OUT = ("evaluation.loss={sources: [test], every_steps: 2, max_packs: 3}",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with two processes, without git and a home; the folder it was started in."""
    folder = tmp_path_factory.mktemp("finished")
    bare = {"PATH": str(folder), "HOME": str(folder / "nowhere"), "TMPDIR": str(folder)}
    output = run("train", str(TINY), cwd=folder, new_store=True, **bare)
    assert "finished: runs/tiny" in output
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the held-out loss after `kill -9` in its first stage between checkpoints; tests work on copies.

    While the job stands still, a second one is refused.
    """
    folder = tmp_path_factory.mktemp("killed")
    process = start("train", str(TINY), *HELD_OUT, cwd=folder)
    wait_for_step(folder / "runs" / "tiny", "connector", 5, process)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        refused = run("train", str(TINY), *HELD_OUT, "train.processes=1", cwd=folder, code=2)
    finally:
        kill(process)
    run_line, refusal = refused.splitlines()
    assert run_line == "run runs/tiny: 1 process, DeepSpeed cpu_zero3"
    assert re.fullmatch(r"alignvlm: runs/tiny/lease-000001.json: another job trains here: .*", refusal)
    return folder


@pytest.fixture
def far_data(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The shards of the finished run in SeaweedFS, and the environment in which jobs find them behind 30 ms."""
    with real.seaweed_server() as server, proxy(server.environment["AWS_ENDPOINT_URL"], Faults(latency=0.03)) as slow:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        helper.stop()
        server.upload(finished / "data", "data")
        helper.stop()
        cache = {"ALIGNVLM_CACHE": str(tmp_path / "cache")}
        yield {**server.environment, "AWS_ENDPOINT_URL": slow, **cache}


def test_everything_that_a_run_promises_is_there(finished: Path) -> None:
    folder = finished / "runs" / "tiny"
    records = metrics(folder)
    assert json.loads((folder / "environment.json").read_text())["git_commit"] is None
    assert [r["stage"] for r in records] == STAGES
    assert [r["step"] for r in records] == [*range(1, 9), *range(1, 5)]
    for record in records:
        assert {"epoch", "loss", "lr", "grad_norm", "tokens", "samples", "seconds", "mfu", "fill"} <= record.keys()
        assert 0 < record["fill"] <= 1
    assert records[2]["lr"] == {"vision": 1e-3, "connector": 2e-3, "language": 5e-4}
    assert set(records[-1]["lr"]) == {"connector", "language"}
    assert any("connector_entropy" in r for r in records)
    for stage in ("0-init", "1-connector", "2-instruct"):
        assert (folder / stage / "export" / "config.json").exists()
        assert (folder / stage / "evaluation" / "results.json").exists()
    results = json.loads((folder / "report" / "results.json").read_text())
    assert set(results["stages"]) == {"init", "connector", "instruct"}
    assert set(results["stages"]["init"]["test"]) >= {"exact_match", "anls", "relaxed_accuracy", "items", "baseline"}
    assert (folder / "report" / "index.html").stat().st_size > 10_000
    assert sorted(p.name for p in (folder / "1-connector" / "checkpoints").iterdir()) == [
        "step-00000006", "step-00000008",
    ]  # fmt: skip


def test_frozen_parts_stay_and_the_others_learn(finished: Path) -> None:
    folder = finished / "runs" / "tiny"
    before, after = (weights(folder / s / "export") for s in ("1-connector", "2-instruct"))
    for name in before:
        assert torch.equal(before[name], after[name]) == (part_of(name) == "vision"), name


def test_mlflow_has_one_parent_and_a_child_per_stage(finished: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny", "tiny/init", "tiny/connector", "tiny/instruct"}
    assert all(r.info.status == "FINISHED" for r in runs.values())
    losses = client.get_metric_history(runs["tiny/connector"].info.run_id, "loss")
    expected = [r["loss"] for r in metrics(finished / "runs" / "tiny") if r["stage"] == "connector"]
    assert [m.value for m in sorted(losses, key=lambda m: m.step)] == expected
    assert runs["tiny"].data.params["stages/connector/weight_decay"] == "0.1"
    assert any(key.startswith("attempt.") for key in runs["tiny"].data.tags)
    assert "eval/test/exact_match" in runs["tiny/instruct"].data.metrics
    assert {f.path for f in client.list_artifacts(runs["tiny"].info.run_id)} >= {"config.yaml", "report"}


def test_a_second_call_finds_nothing_to_do(finished: Path, tmp_path: Path) -> None:
    folder = finished / "runs" / "tiny"
    before = (folder / "metrics.jsonl").read_bytes()
    (tmp_path / "torch.py").write_text("raise ImportError('a finished run needs no torch')")
    without_torch = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert "finished: runs/tiny" in run("train", str(TINY), cwd=finished, PYTHONPATH=without_torch)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_what_is_gone_from_a_finished_run_is_made_again(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")  # with the times of all files
    (copy / "runs" / "tiny" / "2-instruct" / "evaluation" / "results.json").unlink()
    output = run("train", str(TINY), "train.processes=1", cwd=copy)
    assert "evaluate test" in output
    assert "stage" not in output
    assert (copy / "runs" / "tiny" / "2-instruct" / "evaluation" / "results.json").exists()


def test_killed_runs_end_with_the_same_bits(
    finished: Path, killed: Path, tmp_path: Path, far_data: dict[str, str]
) -> None:
    """The second start finds damage while it loads; its launcher is killed in the second stage; the third ends the run.

    The run with the held-out loss, whose data then lie in a real S3 behind 30 ms, has the bits of the one without it
    and from disk.
    """
    words = ("train", str(TINY), *HELD_OUT, "data.root=s3://bucket/data")
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    file = damage_newest(tmp_path / "runs" / "tiny" / "1-connector" / "checkpoints")
    process = start(*words, cwd=tmp_path, **far_data)
    wait_for_step(tmp_path / "runs" / "tiny", "instruct", 1, process)
    time.sleep(0.2)
    kill_launcher(process)
    assert process.stdout is not None
    assert f"is not valid, trying an older one: {file}: size or checksum differs" in process.stdout.read()
    output = run(*words, "train.gradient_checkpointing=auto", cwd=tmp_path, **far_data)
    assert "stage instruct: recomputed layers: vision none, language none (auto: no GPU" in output
    assert not list((tmp_path / "runs" / "tiny").glob("lease-*"))
    folder, reference = tmp_path / "runs" / "tiny", finished / "runs" / "tiny"
    assert curve(folder) == curve(reference)
    measured = {(r["stage"], r["step"]): r["loss/held_out"] for r in metrics(folder) if "loss/held_out" in r}
    steps = [("connector", 2), ("connector", 4), ("connector", 6), ("connector", 8), ("instruct", 2), ("instruct", 4)]
    assert list(measured) == steps
    assert measured["instruct", 4] < measured["connector", 2]
    for stage in ("1-connector", "2-instruct"):
        ours, theirs = weights(folder / stage / "export"), weights(reference / stage / "export")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 4
    child = next(r for r in runs if r.info.run_name == "tiny/connector")
    assert sorted(m.step for m in client.get_metric_history(child.info.run_id, "loss")) == list(range(1, 9))
    check_goodput(folder)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert [path for path in files if far_data["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()] == []


def damage_newest(checkpoints: Path) -> str:
    """Flip a bit among the numbers of the second rank's optimizer in the newest checkpoint; the file's name.

    A later save that the kill has left goes: where both ranks had written it, the next start would seal it.
    """
    for partial in checkpoints.glob("*.partial"):
        shutil.rmtree(partial)
    *_, path = sorted(checkpoints.glob("step-[0-9]*[0-9]/deepspeed/*rank_1_*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def check_goodput(folder: Path) -> None:
    """Two attempts were killed; a save is finished after a later step, so the first one lost a step at least."""
    found = read_goodput(folder)
    ends = [attempt.end for attempt in found.attempts]
    assert (ends[0], ends[2], len(ends)) == ("killed", "finished", 3)
    assert sum(found.parts.values()) == pytest.approx(found.wall, abs=1e-6)
    assert all(sum(each.parts.values()) == pytest.approx(each.wall, abs=1e-6) for each in found.attempts)
    lost = read_json_lines(folder / "lost_steps.jsonl")
    assert "connector" in {r["stage"] for r in lost}
    assert {(r["stage"], r["step"]) for r in lost} < {(r["stage"], r["step"]) for r in metrics(folder)}
    assert found.parts["retaken"] > 0.9 * sum(r["seconds"] for r in lost) > 0
    kept = sum(r["seconds"] for r in metrics(folder))
    assert found.parts["steps"] + found.parts["data_wait"] == pytest.approx(kept, rel=0.1)
    assert found.parts["waiting"] > 0
    assert {"imports", "prepare", "rendezvous", "engine", "load", "save", "export", "report"} < found.sections.keys()
    assert found.parts["unknown"] < 0.1 * found.wall


def test_a_changed_recipe_is_refused_with_the_difference(finished: Path) -> None:
    output = run("train", str(TINY), "stages.connector.weight_decay=0.2", "train.processes=1", cwd=finished, code=2)
    assert "stages.connector.weight_decay: 0.1" in output
    assert "0.2" in output
    assert "Traceback" not in output


def test_changed_shards_are_refused(killed: Path, tmp_path: Path) -> None:
    """The same recipe over other samples: a run that was killed does not go on with them."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    arguments = ["data", "write", str(TINY), "data.root=other", "data.sources.fields.generator_args.seed=5"]
    run(*arguments, cwd=tmp_path)
    (tmp_path / "data" / "fields").rename(tmp_path / "old")
    (tmp_path / "other" / "fields").rename(tmp_path / "data" / "fields")
    output = run("train", str(TINY), *HELD_OUT, "train.processes=1", cwd=tmp_path, code=2)
    assert "Traceback" not in output
    assert "source 'fields': data/fields was made with" in output
