"""AlignVLM: a distributed training stack for document vision-language models. Importing it loads nothing heavy."""

from __future__ import annotations

__version__ = "0.1.0"
