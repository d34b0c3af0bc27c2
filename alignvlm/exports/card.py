"""The model card of an export: README.md, which the Hub shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CARD = "README.md"
STAGE_FOLDER = re.compile(r"(\d+)-(.+)")
"""Name of a stage's folder in a run."""
_TEMPLATE = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- alignvlm
---

# {name}

A vision-language model for documents with {parameters:,} parameters.

| vision encoder | connector | language model |
|---|---|---|
| {vision} | {connector} | {language} |

```python
# pip install alignvlm
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the Hub
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
question = [{{"type": "image"}}, {{"type": "text", "text": "What is the total?"}}]
inputs = processor.prepare_generation([[{{"role": "user", "content": question}}]], [["page.png"]])
tokens = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
```
"""


def card_for(card: str, repository: str) -> str:
    """The card with the name of its repository on the Hub in its code."""
    return re.sub(r"^folder = .*$", f'folder = "{repository}"', card, flags=re.MULTILINE)


def model_card(model: Any, weights: dict[str, Any], folder: Path) -> str:
    """The model card of a folder that is written."""
    config = model.config
    parts = {"vision": config.vision_config.model_type, "language": config.text_config.model_type}
    return _TEMPLATE.format(
        name=name_of_export(folder),
        connector=config.connector_config["kind"],
        parameters=sum(weights[name].numel() for name, _ in model.named_parameters()),
        **parts,
    )


def name_of_export(folder: Path) -> str:
    """The name of a model: that of the run where the folder is one of a run, else the folder's own."""
    folder = folder.absolute()
    return folder.parents[1].name if STAGE_FOLDER.fullmatch(folder.parent.name) else folder.name
