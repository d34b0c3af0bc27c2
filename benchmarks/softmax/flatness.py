"""How flat the softmax of an ALIGN export is, and what its visual tokens are made of, at several gains.

Per gain (gamma of the LayerNorm over the vocabulary set to it; without --gains as the export has it): entropy and
largest probability, how many tokens hold 0.9 of the mean distribution, the size of visual tokens beside that of text
embeddings, how much of them all visual tokens share, and which part of what differs between them is linear in the
logits: with logits l of mean 0, softmax(l) E is mean(E) + l E / V to first order. Before the training, and after it:

    python benchmarks/softmax/flatness.py runs/quickstart/0-init/export --data data/quickstart/digits_read --gains 1,2
    python benchmarks/softmax/flatness.py runs/quickstart/1-connector/export --data data/quickstart/digits_read
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alignvlm.connectors import AlignConnector
from alignvlm.evaluation.vocabulary_mass import images_of
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder of an export with an unrestricted ALIGN connector")
    parser.add_argument("--data", required=True, help="folder of shards with images")
    parser.add_argument("--images", type=int, default=40, help="how many images")
    parser.add_argument("--gains", default="", help="comma-separated; default: gamma as it is")
    arguments = parser.parse_args()

    model = AlignVLMForConditionalGeneration.from_pretrained(arguments.export).eval()
    connector = model.model.connector
    if not isinstance(connector, AlignConnector) or connector.is_restricted or connector.gamma is None:
        parser.error(f"{arguments.export}: its connector is no ALIGN with its whole vocabulary and a LayerNorm over it")
    spec = AlignVLMProcessor.from_pretrained(arguments.export).spec
    embedding = model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        tiles = [torch.from_numpy(spec.cut(image)) for image in images_of([arguments.data], arguments.images)]
        features = model.model.encode_tiles(torch.cat(tiles)).flatten(0, 1)  # [N, d]
        print(f"ln V {math.log(len(embedding)):.3f}, rms of a text embedding {rms(embedding):.4f}, N {len(features)}")
        for gain in arguments.gains.split(",") if arguments.gains else [None]:
            if gain is not None:
                connector.gamma.fill_(float(gain))
            found = measure(connector, features, embedding)
            print(f"gain {gain or 'as it is'}:", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))


def measure(connector: AlignConnector, features: Tensor, embedding: Tensor) -> dict[str, float]:
    """The numbers of one gain, from features [N, d] and E [V, D]."""
    p = connector.probabilities(features)  # [N, V]
    logits = p.clamp_min(1e-30).log()
    average = p @ embedding
    linear = (logits - logits.mean(dim=1, keepdim=True)) @ embedding / len(embedding)
    differs, linear = average - average.mean(dim=0), linear - linear.mean(dim=0)
    scale = (differs * linear).sum() / linear.square().sum()
    tokens = connector(features, embedding)
    sorted_mass = p.mean(dim=0).sort(descending=True).values.cumsum(0)
    return {
        "entropy": float(-(p * logits).sum(dim=1).mean()),
        "largest probability": float(p.amax(dim=1).mean()),
        "tokens with 0.9 of the mass": float((sorted_mass < 0.9).sum() + 1),
        "rms of a visual token": rms(tokens),
        "shared by all": float(tokens.mean(dim=0).square().mean() / tokens.square().mean()),
        "linear part": float(1 - (differs - scale * linear).square().sum() / differs.square().sum()),
    }


def rms(x: Tensor) -> float:
    """Root of the mean square of all elements."""
    return float(x.square().mean().sqrt())


if __name__ == "__main__":
    main()
