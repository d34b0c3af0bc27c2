"""A real job of two ranks that reads its data from the Hub: its branch moves meanwhile, and the Hub limits requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import Jobs
from tests.jobs import TINY, curve
from tests.stores.fake_hub import FakeHub
from tests.stores.servers import Answer

WORDS = [str(TINY), "stages.instruct=null", "evaluation.tasks.test=null", "stages.connector.max_steps=4"]
WORDS += [f"data.sources.{name}.generator_args.num_samples=60" for name in ("fields", "charts")]
FAR = [*WORDS, "data.root=hf://datasets/org/name", "name=far", "data.sources.fields.read=ranges"]
"""The charts are read from whole shards."""


@pytest.mark.cluster
def test_both_ranks_read_the_commit_of_their_start(hub: FakeHub, tmp_path: Path) -> None:
    near, far = tmp_path / "runs" / "tiny", tmp_path / "runs" / "far"
    refused: list[str] = []
    first, answer = "", hub.answer

    def move_and_refuse(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """With the first request for a shard `main` becomes another commit, and the limit of requests is reached."""
        if target.endswith(".tar") and len(refused) < 4:
            if not refused:
                hub.commit({"fields/000000.tar": b"another file"})
            refused.append(method)
            return 429, {"ratelimit": '"resolvers";r=0;t=1'}, b""
        return answer(method, target, headers, body)

    with Jobs(tmp_path) as jobs:
        assert jobs.train(WORDS).codes == [0, 0]
        files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
        first = hub.commit({path.relative_to(tmp_path / "data").as_posix(): path.read_bytes() for path in files})
        hub.answer = move_and_refuse  # type: ignore[method-assign]
        ended = jobs.train(FAR)
    assert ended.codes == [0, 0], ended.output[-3000:]
    assert curve(far) == curve(near)
    assert hub.main != first
    assert len(refused) == 4
    (attempt,) = map(json.loads, (far / "attempts.jsonl").read_text().splitlines())
    assert attempt["hub"] == {"datasets/org/name@main": first}
    shards = [path for _, path in hub.log if "/resolve/" in path and path.endswith(".tar")]
    assert shards
    assert {path.split("/resolve/")[1].split("/")[0] for path in shards} == {first}
    assert {name.rsplit("/", 2)[-2] for name in shards} == {"fields", "charts"}
