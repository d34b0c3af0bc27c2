"""`alignvlm estimate`."""

from __future__ import annotations

import json

from tests.fixtures.command import Command


def test_estimate_prints_tables(command: Command) -> None:
    out = command("estimate", "paper_llama32_1b", "--world-size", "64")
    words = "262.7 M", "alignment", "optimizer states", "one plain N x V tensor", "a node of 8 GPUs", "Everything fits."
    for word in words:
        assert word in out
    fused = {line.split()[0]: line.split()[1:] for line in out.splitlines() if " Llama" in line}
    assert fused == {"RMSNorm": ["33", "LlamaRMSNorm"], "SwiGLU": ["16", "LlamaMLP"], "RoPE": ["16", "LlamaAttention"]}
    assert "stages.alignment.deepspeed=zero1" in " ".join(out.split())
    assert "is the least that fits" in " ".join(out.split())


def test_estimate_prints_json_and_fails_where_it_does_not_fit(command: Command) -> None:
    arguments = ("paper_llama31_8b", "--world-size", "64", "--gpu-memory", "16", "--json")
    data = json.loads(command("estimate", *arguments, code=1))
    assert data["fits"] is False
    assert data["w2_parameters"] == 525_336_576
    assert data["stages"][0]["memory"]["gpu_total"] > 16 * 2**30


def test_arguments_out_of_range_are_refused(command: Command) -> None:
    assert "--mfu 40: must be above 0 and at most 1" in command("estimate", "quickstart", "--mfu", "40", code=2)


def test_the_former_name_says_the_new_one(command: Command) -> None:
    said = command("plan", "quickstart", "seed=1", "--world-size", "8", code=2)
    assert said.startswith("alignvlm: alignvlm plan is now alignvlm estimate quickstart seed=1 --world-size 8 ")
    assert said.count("\n") == 1
