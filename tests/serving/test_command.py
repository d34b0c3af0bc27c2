"""`alignvlm serve` as a process: it says where it is, answers, and one Ctrl-C ends it, whatever it is at."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.jobs import kill, start
from tests.serving.server import ask, question, stream
from tests.tiny import picture, tiny_model


@pytest.mark.slow
def test_a_server_from_start_to_end(tmp_path: Path) -> None:
    for part in tiny_model(
        text={"tie_word_embeddings": False, "initializer_range": 0.5, "max_position_embeddings": 10**5}
    ):
        part.save_pretrained(tmp_path / "tiny")
    process = start("serve", "tiny", "--port", "0", "--device", "cpu", cwd=tmp_path)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"tiny answers at http://127\.0\.0\.1:(\d+)/v1 \(Ctrl-C ends it\)\n", said)
        assert found, said + process.stdout.read()
        port = int(found[1])
        assert ask(port, question("what is the total", picture(70, 40), max_tokens=2))[0] == 200
        events = stream(port, question("what is the total", max_tokens=90_000))
        assert "error" not in next(events)
        process.send_signal(signal.SIGINT)
        (*_, last) = events
        assert last["error"]["code"] == "stopping"
        assert process.stdout.read() == "stopped\n"
        assert process.wait(30) == 0
    finally:
        kill(process)
