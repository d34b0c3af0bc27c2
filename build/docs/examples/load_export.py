"""Load an exported model with transformers' Auto classes and ask it about an image.

    python examples/load_export.py runs/quickstart/3-instruct/export page.png "What is the total?"

EXPORT is what every stage of a run leaves behind: a Hugging Face folder with weights, configuration and processor.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import alignvlm.model  # noqa: F401  # makes the Auto classes know the model type "alignvlm"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask an exported model about an image.")
    parser.add_argument("export", help="export folder of a run's stage")
    parser.add_argument("image", help="image file")
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(arguments.export)
    model = AutoModelForImageTextToText.from_pretrained(arguments.export).to(device).eval()

    content = [{"type": "image", "path": arguments.image}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(device)  # fmt: skip
    tokens = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer.strip())


if __name__ == "__main__":
    main()
