"""The model as vLLM's Transformers backend runs it: only what that backend cannot know of this model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class ServedByVLLM(TransformersMultiModalForCausalLM):
    """vLLM's own class for multimodal models of transformers, with the whole table for the connector."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM does it; with tensor parallelism, where a rank has its rows of the embedding only, all rows are kept.

        Not run yet on more than one GPU.
        """
        loaded = super().load_weights(weights)
        if self.tp_group.world_size > 1 and self.pp_group.is_first_rank:
            model: Any = self.model
            rows = model.get_input_embeddings().weight.detach()  # this rank's; all ranks' are [V, D] and vLLM's padding
            model.gathered_embedding = tensor_model_parallel_all_gather(rows, dim=0)
        return loaded

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As vLLM does it; the placeholder of an image is never said, as in `generate`."""
        logits = super().compute_logits(hidden_states)
        if logits is not None and self.config.image_token_id < logits.shape[-1]:
            logits[:, self.config.image_token_id] = -torch.inf
        return logits
