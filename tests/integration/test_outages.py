"""A store that goes away while a real job of two ranks trains: it is waited for, and after long enough given up."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest

from tests.faults import SAVED, Jobs
from tests.fixtures.buckets import Bucket
from tests.jobs import TINY, curve, metrics
from tests.stores.servers import Answer, MemoryS3

WORDS = [str(TINY), "stages.instruct=null", "evaluation.tasks.test=null"]
WORDS += [f"data.sources.{name}.generator_args.num_samples=60" for name in ("fields", "charts")]
FAR = [*WORDS, "data.root=s3://bucket/data", "name=far", "data.sources.fields.read=ranges"]  # charts: whole shards
GIVEN_UP = r"s3://bucket/data/(fields|charts)/000000\.tar: .*; no answer for \d+ s; the same command goes on when .*"
OTHER_RANK = r"1 of 2 ranks could not load their data and say why.*"


class Outage:
    """The store of a run is gone from the first sample on that training asks for; None: for good."""

    def __init__(self, bucket: Bucket, run: Path, seconds: float | None) -> None:
        self._bucket, self._timeline, self._seconds, self._is_due = bucket, run / "timeline.jsonl", seconds, True
        self._starts = self._engines()
        bucket.store.answer = self._answer  # type: ignore[method-assign]

    def _engines(self) -> int:
        return self._timeline.read_text().count('"engine"') if self._timeline.exists() else 0

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if self._is_due and target.endswith(".tar") and self._engines() > self._starts:
            self._is_due, self._bucket.faults.down = False, True
            if self._seconds is not None:
                threading.Timer(self._seconds, setattr, (self._bucket.faults, "down", False)).start()
        return MemoryS3.answer(self._bucket.store, method, target, headers, body)


@pytest.mark.parametrize(
    ("seconds", "patience", "retries"),
    [pytest.param(2, 6, 1, marks=pytest.mark.cluster), pytest.param(60, 90, 10, marks=pytest.mark.faults)],
)
def test_a_job_survives_an_outage_and_is_given_up_after_a_longer_one(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, patience: int, retries: int
) -> None:
    """The same command, started again, ends with the losses of the run from disk. One warning a minute on the node."""
    monkeypatch.setenv("ALIGNVLM_PATIENCE", str(patience))
    monkeypatch.setenv("ALIGNVLM_RETRIES", str(retries))
    near, far = tmp_path / "runs" / "tiny", tmp_path / "runs" / "far"
    with Jobs(tmp_path) as jobs:
        assert jobs.train(WORDS).codes == [0, 0]
        bucket.upload(tmp_path / "data", "data")
        Outage(bucket, far, None)
        given_up = jobs.train(FAR)
        bucket.faults.down = False
        Outage(bucket, far, seconds)
        survived = jobs.train(FAR)
    # Its launcher ends with the first code; whoever takes long to end then is sent SIGTERM.
    assert SAVED in given_up.codes, given_up.output[-3000:]
    assert set(given_up.codes) <= {SAVED, 128 + signal.SIGTERM}
    said = re.findall(r"^alignvlm: (?:rank \d: )?(.*)", given_up.output, re.MULTILINE)
    assert said
    assert all(re.fullmatch(f"{GIVEN_UP}|{OTHER_RANK}", line) for line in said), said
    assert any(re.fullmatch(GIVEN_UP, line) for line in said)
    assert survived.codes == [0, 0], survived.output[-3000:]
    assert max(row["seconds"] for row in metrics(far)) > 0.7 * seconds  # a rank with data waits for the other one
    output = given_up.output + survived.output
    assert "Traceback" not in output
    assert 1 <= output.count("; waiting for the store, at most") <= 1 + (given_up.seconds + survived.seconds) // 60
    assert curve(far) == curve(near)
