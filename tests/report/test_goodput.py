"""Every part of a run's wall clock, from written files with planted delays."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from alignvlm.cli import main
from alignvlm.errors import UserError
from alignvlm.report.attempts import PARTS
from alignvlm.report.failures import project
from alignvlm.report.goodput import Goodput, read_goodput
from alignvlm.report.report import build_report
from alignvlm.run_folder import RunFolder
from data_pipeline.files import write_json_lines

T = 1_800_000_000.0


def mark(at: float, section: str, **facts: Any) -> dict[str, Any]:
    return {"time": T + at, "section": section, **facts}


def step(number: int, ended: float, seconds: float, data_wait: float = 0.0, stage: str = "joint") -> dict[str, Any]:
    return {"stage": stage, "step": number, "time": T + ended, "seconds": seconds, "data_wait": data_wait}


def write(folder: Path, timeline: list[Any], metrics: list[Any], lost: list[Any] = ()) -> RunFolder:
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in ((run.timeline, timeline), (run.metrics, metrics), (run.lost_steps, lost)):
        write_json_lines(path, rows)
    return run


def check(found: Goodput, wall: float, **parts: float) -> None:
    assert found.parts == {name: parts.get(name, 0.0) for name in PARTS}
    assert found.wall == wall == sum(found.parts.values())
    assert sum(found.sections.values()) == pytest.approx(wall, abs=1e-6)
    assert found.ettr == parts.get("steps", 0.0) / wall


FIRST = [
    mark(0, "imports", host="node7"), mark(5, "prepare"), mark(25, "rendezvous"), mark(27, "evaluation"),
    mark(37, "engine"), mark(41, "load"), mark(44, "steps"), mark(65.5, "save"), mark(68, "steps"),
]  # fmt: skip
SECOND = [
    mark(200, "imports", host="node8", last_beat=T + 81), mark(204, "prepare"), mark(205, "rendezvous"),
    mark(206, "engine"), mark(210, "steps"), mark(231, "save"), mark(233, "export"), mark(240, "evaluation"),
    mark(255, "report"), mark(256, "delivery"), mark(257, "end", finished=True),
]  # fmt: skip
KEPT = [step(1, 54, 10, 2), step(2, 65, 10, 0.5), step(3, 220, 10, 4), step(4, 230, 9.5)]
LOST = [step(3, 78, 9.5, 1)]


def test_every_second_of_a_run_with_planted_delays_has_its_part(tmp_path: Path) -> None:
    """The first attempt is killed in its fourth step, three seconds after the third one, which had no checkpoint."""
    found = read_goodput(write(tmp_path, [*FIRST, *SECOND], KEPT, LOST).path)
    check(
        found,
        wall=257,
        steps=8 + 9.5 + 6 + 9.5,
        data_wait=2 + 0.5 + 4,
        start_up=27 + (41 - 37) + (44 - 41) + 10,
        retaken=9.5 + (81 - 78),
        save=2.5 + 2,
        evaluation=10 + (257 - 233),
        waiting=200 - 81,
        unknown=1 + 0.5 + 0.5 + 0.5 + 1,
    )
    first, second = found.attempts
    assert [(a.host, a.end, a.wall, a.waited) for a in found.attempts] == [
        ("node7", "killed", 81, 0), ("node8", "finished", 57, 119_000_000),
    ]  # fmt: skip
    assert (first.parts["retaken"], second.parts["retaken"]) == (12.5, 0)
    assert sum(first.parts.values()) == first.wall
    assert found.sections["prepare"] == 20 + 1


def test_what_stands_in_no_file_is_unknown(tmp_path: Path) -> None:
    """A version without a timeline, which was also killed while a step was in metrics.jsonl twice."""
    rows = [step(1, 10, 10, 1), step(2, 25, 10), step(2, 60, 5, 1), {"stage": "joint", "step": 3}]
    found = read_goodput(write(tmp_path, [], rows).path)
    check(found, 60, steps=9 + 4, data_wait=2, retaken=10, unknown=35)
    assert [attempt.end for attempt in found.attempts] == ["unknown"]


def test_a_run_that_is_not_over_goes_on_to_its_last_sign_of_life(tmp_path: Path) -> None:
    run = write(tmp_path, FIRST[:7], KEPT[:2])
    (tmp_path / "lease-000002.json").write_text("{}")
    os.utime(tmp_path / "lease-000002.json", (T + 70, T + 70))
    found = read_goodput(run.path)
    check(found, 70, steps=17.5, data_wait=2.5, start_up=34, evaluation=10, unknown=1 + 5)
    assert found.attempts[0].end == "open"


def test_time_after_the_end_of_a_finished_run_is_not_counted(tmp_path: Path) -> None:
    again = [mark(9000, "imports"), mark(9002, "evaluation"), mark(9007, "end", finished=True)]
    found = read_goodput(write(tmp_path, [*SECOND, *again], KEPT[2:]).path)
    assert found.wall == 57 + 7
    assert found.parts["waiting"] == 0


def test_clocks_of_hosts_that_differ_make_no_time_negative_or_twice(tmp_path: Path) -> None:
    late = [*FIRST, mark(70, "end", finished=False)]
    early = [{**line, "time": line["time"] - 140} for line in SECOND]
    found = read_goodput(write(tmp_path, [*late, *early], KEPT[:2]).path)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert found.wall == sum(found.parts.values()) == 257 - 140


def test_a_clock_that_is_set_back_stands_still_until_it_is_where_it_was(tmp_path: Path) -> None:
    """By 30 s while a checkpoint loads, 43 s after the start."""
    back = [*FIRST[:6], *({**line, "time": line["time"] - 30} for line in FIRST[6:]), mark(50, "end")]
    found = read_goodput(write(tmp_path, back, [step(1, 48, 2)]).path)
    check(found, 50, steps=2, start_up=27 + 4, evaluation=10, unknown=9 - 2)


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "node7-with-a-name-of-some-length.example.org"
    write(tmp_path, [FIRST[0] | {"host": long}, *FIRST[1:], *SECOND], KEPT, LOST)
    assert main(["goodput", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "ETTR 12.8 %: 33 s of steps that count in 4 min 17 s, 2 attempts" in table
    assert re.search(
        r"start-up +44 s +17\.1 %   imports 9 s, prepare 21 s, rendezvous 3 s, engine 8 s, load 3 s\n", table
    )
    assert re.search(r"2 +2027-01-15 08:03:20 +node8 +finished +57 s +1 min 59 s +27\.2 %\n", table)
    rows = zip(table.splitlines()[-3:], ("end", "killed", "finished"), strict=True)
    assert len({row.index(f"  {word} ") for row, word in rows}) == 1
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ettr"] == 33 / 257
    assert sum(found["seconds"].values()) == found["wall_seconds"] == 257
    assert [attempt["end"] for attempt in found["attempts"]] == ["killed", "finished"]


def test_the_page_has_a_bar_for_all_and_one_for_every_attempt(run_folder: Path) -> None:
    times = {kind: {"mean": 2.0, "max": 3.0, "rank": 5} for kind in ("compute", "wait", "data", "tiles", "tokens")}
    more = [{"ranks": times, "stragglers": ["rank 5 on <node7>"]}, {"ranks": {"compute": 1}}, {}, {"ranks": times}]
    write(run_folder, [*FIRST, *SECOND], [line | each for line, each in zip(KEPT, more, strict=True)], LOST)
    page = build_report(run_folder).read_text(encoding="utf-8")
    section = page[page.index('<section id="time">') : page.index("</section>", page.index('<section id="time">'))]
    assert "12.8 % of the wall clock" in section
    assert section.count('class="stack"') == 3
    for bar in re.findall(r'class="stack">(.*?)</div>', section):
        assert sum(map(float, re.findall(r"width:([\d.]+)%", bar))) == pytest.approx(100, abs=0.01)
    assert 'title="steps taken again: 12 s"' in section
    assert '<td class="n">3</td><td class="n">1.50</td><td>rank 5 (100.0 %)</td>' in section
    assert "rank 5 on &lt;node7&gt; (1 lines)" in section
    assert "Times of the ranks" in page
    results = json.loads((run_folder / "report" / "results.json").read_text())
    assert results["goodput"] == json.loads(json.dumps(read_goodput(run_folder).to_json()))


def test_the_job_that_finishes_a_run_has_finished_on_the_page_that_it_writes(run_folder: Path) -> None:
    write(run_folder, [*FIRST, *SECOND[:-1]], KEPT, LOST)
    assert read_goodput(run_folder).attempts[-1].end == "open"
    assert "finished on node8" in build_report(run_folder).read_text(encoding="utf-8")


def test_times_that_are_none_are_passed_over(tmp_path: Path) -> None:
    run = write(tmp_path, [*FIRST, *SECOND], KEPT, LOST)
    whole = read_goodput(run.path)
    with run.timeline.open("a") as timeline, run.metrics.open("a") as metrics:
        timeline.write('{"time": NaN, "section": "save"}\n{"time": 1e400, "section": "imports"}\n')
        metrics.write('{"stage": "joint", "step": 9, "time": 1e400, "seconds": 1, "data_wait": 0}\n')
        metrics.write('{"stage": "joint", "step": 9, "time": 1, "seconds": 9e10, "data_wait": 0}\n')
    assert read_goodput(run.path) == whole


def test_what_the_files_lack_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write(tmp_path, [*FIRST, *SECOND], KEPT, LOST)
    (tmp_path / "1-joint" / "checkpoints" / "step-00000004").mkdir(parents=True)
    whole = read_goodput(run.path)
    assert caplog.messages == []
    os.truncate(run.metrics, run.metrics.stat().st_size - 5)
    assert read_goodput(run.path).parts["steps"] < whole.parts["steps"]
    rest = "what is not there counts as unknown, or not at all"
    assert caplog.messages == [
        f"the last line of {run.metrics} was cut off, or is being written: {rest}",
        f"{run.metrics} ends at step 3 of stage joint, which has a checkpoint of step 4: {rest}",
    ]
    caplog.clear()
    run.timeline.unlink()
    read_goodput(run.path)
    assert caplog.messages[0] == f"{run.timeline} is missing: {rest}"


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither timeline\.jsonl nor metrics\.jsonl says when it trained"):
        read_goodput(tmp_path)


def test_the_cost_of_a_failure_is_that_of_the_run_and_the_rest_keeps_its_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run of two attempts, of which one was killed; every number by hand."""
    run = write(tmp_path / "run", FIRST + SECOND, KEPT, LOST)
    found = read_goodput(run.path)
    steps = found.parts["steps"]
    projected = project(found, 20 * 60.0)
    start_up = (5 + 20 + 2 + 4 + 3 + 4 + 1 + 1 + 4) / 2
    assert projected.costs == {"start_up": start_up, "retaken": found.parts["retaken"], "waiting": 119.0}
    rest = found.wall - sum(found.parts[part] for part in ("start_up", "retaken", "waiting"))
    lost = start_up + found.parts["retaken"]
    assert projected.ettr == pytest.approx(steps / rest * (1 - (lost + 119.0) / 1200))
    assert projected.ettr_without_waiting == pytest.approx(steps / rest * (1 - lost / (1200 - 119.0)))
    assert sum(projected.shares.values()) == pytest.approx(1)
    assert project(found, 60.0).ettr == 0
    assert main(["goodput", str(run.path), "--failure-every", "20"]) == 0
    assert f"with a failure every 20 min 00 s: ETTR {100 * projected.ettr:.1f} %" in capsys.readouterr().out
    finished = write(tmp_path / "finished", SECOND, KEPT[2:])
    assert main(["goodput", str(finished.path), "--failure-every", "20"]) == 2
    assert "no attempt of this run has ended early" in capsys.readouterr().err
