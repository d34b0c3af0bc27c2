"""`kill -9` of a random rank at a random moment, twenty times in one run; the weights equal the uninterrupted run's.

What the kills cost is scaled to one every 20 minutes (tests/cluster/goodput.py).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.cluster.goodput import kept_of_failures
from tests.integration.test_elastic import ranks_of
from tests.jobs import TINY, curve, kill, metrics, run, start, weights

KILLS = 20
SAVE_STEPS = 2
RECIPE = [
    str(TINY),
    "stages.connector.max_steps=60",
    "stages.instruct.max_steps=40",
    f"checkpoint.every_steps={SAVE_STEPS}",
]
RECIPE += ["evaluation.tasks.test=null"]


@pytest.mark.kills
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    chance = random.Random(0)
    reference, folder = tmp_path / "reference", tmp_path / "killed"
    reference.mkdir()
    folder.mkdir()
    run("train", *RECIPE, cwd=reference, timeout=400)
    steps = len(metrics(reference / "runs" / "tiny"))
    moments = []
    for number in range(KILLS):
        process = start("train", *RECIPE, cwd=folder)
        goal = steps * (number + 1) // (KILLS + 1)  # progress is forced, the moment around it is chance
        deadline = time.monotonic() + 240
        while len(metrics(folder / "runs" / "tiny")) < goal and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        assert process.poll() is None, process.communicate()[0][-3000:]
        os.kill(chance.choice(ranks_of(process)), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        kill(process)
        moments.append(len(metrics(folder / "runs" / "tiny")))
    run("train", *RECIPE, cwd=folder, timeout=400)
    assert len(set(moments)) > KILLS // 2
    assert curve(folder / "runs" / "tiny") == curve(reference / "runs" / "tiny")
    for stage in ("1-connector", "2-instruct"):
        ours = weights(folder / "runs" / "tiny" / stage / "export")
        theirs = weights(reference / "runs" / "tiny" / stage / "export")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert kept_of_failures(folder / "runs" / "tiny") >= 0.90
