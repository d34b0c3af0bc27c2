#!/usr/bin/env python3
"""Asks a server the questions of a stage's gallery and compares its answers with the evaluation's.

Any server with OpenAI's API: `alignvlm serve`, vLLM, SGLang. Questions about one image in one turn are asked, greedily.
Pictures with a side of more than 1,280 pixels were shrunk for the gallery: answers about them may differ.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main() -> int:
    """Exit code 1 when an answer differs, 2 when there is nothing to ask."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", type=Path, help="folder of a stage, such as runs/quickstart/3-instruct")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="as in the evaluation (default: %(default)s)")
    args = parser.parse_args()
    rows = gallery(args.stage / "evaluation")
    if not rows:
        print(f"{args.stage}/evaluation: no gallery with questions about one image", file=sys.stderr)
        return 2
    (model, *_) = [entry["id"] for entry in get(f"{args.url}/models")["data"]]
    equal = 0
    for row, picture in rows:
        said = plain(ask(args.url, model, row["question"], picture, args.max_new_tokens))
        stored = plain(row["prediction"])
        equal += said == stored
        if said != stored:
            print(f"{picture.name}: {said!r}, in the evaluation {stored!r}")
    print(f"{equal} of {len(rows)} answers are equal")
    return 0 if equal == len(rows) else 1


def gallery(evaluation: Path) -> list[tuple[dict[str, Any], Path]]:
    """Stored predictions with one picture, and where the picture is."""
    found = []
    for path in sorted(evaluation.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if len(row.get("images", ())) == 1 and not row.get("turn"):
                found.append((row, evaluation / row["images"][0]))
    return found


def plain(answer: str) -> str:
    """Without white space around it, and without half a character, which servers leave out where the limit cuts one."""
    return answer.rstrip("\ufffd").strip()


def ask(url: str, model: str, question: str, picture: Path, max_tokens: int) -> str:
    """The server's answer to a question about a picture."""
    data = base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return get(request)["choices"][0]["message"]["content"]


def get(request: Any) -> Any:
    """JSON of a response."""
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


if __name__ == "__main__":
    sys.exit(main())
