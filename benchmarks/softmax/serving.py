"""Answers of a server's model with the whole vocabulary in the connector, and with the tokens that carry its mass.

    python benchmarks/softmax/serving.py
    python benchmarks/softmax/serving.py --rounds 1 --layers 2

The language model has the shapes of SmolLM2-135M (49,152 tokens), the vision encoder those of SigLIP base (196 patches
a tile), all weights are random: nothing is downloaded. Both models differ in the connector alone and answer the same
question about one page in turn, so that other work on the machine meets both alike; seconds are CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _common import write

VOCABULARY = 49_152
ACTIVE = VOCABULARY * 34 // 1280
"""As many of these tokens as 3.4K are of 128K, which carry the mass in the paper."""


def main() -> int:
    """Measure, print and write serving.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="answers of each (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=30, help="of the language model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    args = parser.parse_args()
    found = measure(args.rounds, args.layers, args.tokens)
    for name, seconds in found["seconds"].items():
        print(f"{name:16} first token {seconds['first']:6.2f} s   {args.tokens} tokens {seconds['all']:6.2f} s")
    print(f"restricted / whole: first token {found['ratio_first']:.3f}, whole answer {found['ratio_all']:.3f}")
    print(f"wrote {write('serving', found)}")
    return 0


def measure(rounds: int, layers: int, tokens: int) -> dict[str, Any]:
    """CPU seconds to the first token and to the end of an answer: medians, and medians of the pairs' ratios."""
    models = {"whole": answerer(None, layers), "restricted": answerer(ACTIVE, layers)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(rounds + 1):  # the first round warms up
        for name, model in models.items():
            spent = answer(model, tokens)
            if number:
                times[name].append(spent)
    pairs = list(zip(times["restricted"], times["whole"], strict=True))
    return {
        "vocabulary": VOCABULARY,
        "active_tokens": ACTIVE,
        "layers": layers,
        "tokens": tokens,
        "rounds": rounds,
        "seconds": {
            name: {
                part: round(statistics.median(each[i] for each in spent), 3) for i, part in enumerate(("first", "all"))
            }
            for name, spent in times.items()
        },
        "ratio_first": round(statistics.median(a[0] / b[0] for a, b in pairs), 3),
        "ratio_all": round(statistics.median(a[1] / b[1] for a, b in pairs), 3),
    }


def answerer(num_active: int | None, layers: int) -> Any:
    """A model of these shapes, on the CPU."""
    from alignvlm.evaluation.answering import ModelAnswerer
    from tests.tiny import tiny_model

    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16,
    }  # fmt: skip
    text = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    }  # fmt: skip
    model = ModelAnswerer(*tiny_model({"num_active": num_active}, text, vision=vision), "cpu")
    model.stop_ids = []
    return model


def answer(model: Any, tokens: int) -> tuple[float, float]:
    """CPU seconds until the first token, and until the last."""
    from alignvlm.evaluation.items import Item
    from alignvlm.serving.generation import Settings, answer
    from tests.tiny import picture

    content = [{"type": "image"}, {"type": "text", "text": "what is the total"}]
    inputs = model.prepare([Item("k", 0, "", [], [{"role": "user", "content": content}], [picture(448, 224)])])
    asked: list[float] = []

    def note() -> bool:  # asked before the prompt, and after it and every token
        asked.append(time.process_time())
        return False

    begin = time.process_time()
    answer(model, inputs, Settings(tokens), lambda piece: None, note)
    return asked[2] - begin, time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
