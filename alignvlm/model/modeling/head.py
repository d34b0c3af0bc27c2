"""The model with the language model's head: logits, the loss of training, `generate`.

The same forward pass serves training on packed documents (`labels`, `cu_seqlens`), evaluation and `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from alignvlm.kernels.linear_cross_entropy import IGNORE_INDEX, find_targets, linear_cross_entropy, next_labels
from alignvlm.kernels.matmul import wide_dtype
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.modeling.base import CACHE, AlignVLMModel, AlignVLMPreTrainedModel
from alignvlm.parts import module_name


@dataclass
class AlignVLMOutput(CausalLMOutputWithPast):
    """What a forward pass returns; the cache has transformers' name, `cache` from 5.24 on, else `past_key_values`.

    `loss`, where labels were given, is the sum of the token losses divided by `num_items_in_batch` (or their mean),
    fp32. `logits` are [B, T, V], or of the tokens in `logits_to_keep`; None where they were not wanted.
    `hidden_states` are the language model's input and the output of each of its layers, [B, T, D], where they were
    asked for.
    """

    token_losses: torch.Tensor | None = None
    """[M], where labels were given: the cross entropy of every target, fp32, without a gradient; None if compiled."""


class AlignVLMForConditionalGeneration(AlignVLMPreTrainedModel, GenerationMixin):
    """`AlignVLMModel` with the language model's head: logits, loss and `generate`."""

    def __init__(
        self, config: AlignVLMConfig, vision: PreTrainedModel | None = None, language: PreTrainedModel | None = None
    ) -> None:
        """`vision`, an encoder, and `language`, a causal LM, may exist already; else they are built from the config."""
        super().__init__(config)
        vision = vision if vision is not None else AutoModel.from_config(config.vision_config)
        language = language if language is not None else AutoModelForCausalLM.from_config(config.text_config)
        decoder: Any = language.base_model
        embedding = decoder.get_input_embeddings()
        name = next(name for name, module in decoder.named_modules() if module is embedding)
        if language._tied_weights_keys:  # whether they are tied is in the config
            self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.model = AlignVLMModel(config, vision, decoder)
        self.lm_head: Any = language.get_output_embeddings()
        self.loss_chunk = 2048
        self.post_init()
        head_plan = {key: plan for key, plan in (type(language)._tp_plan or {}).items() if key == "lm_head"}
        self._tp_plan = {**(self._tp_plan or {}), **head_plan}

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `AlignVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        visual_positions: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: Mapping[str, BaseModelOutputWithPooling] | None = None,
        shift_labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> AlignVLMOutput:
        """One pass.

        Args:
            input_ids: [B, T]; visual tokens are `config.image_token_id`.
            pixel_values: tiles of all images in reading order, [K, 3, S, S], uint8 or normalised floats.
            mm_encoder_outputs: instead of `pixel_values`, {"image": what `get_image_features` returned}.
            labels: [B, T], -100 where unsupervised, not shifted; gives a loss.
            shift_labels: instead of `labels`: [B, T], the label of the next token in each place.
            cu_seqlens: int32 [num_documents + 1] for a packed micro-batch (B = 1), with `max_seqlen`, and
                `position_ids` [1, T] that restart in every document. Best on the host, where it is read.
            visual_positions: int64 [N], where the visual tokens are in the flattened `input_ids`.
            target_positions: int64 [M], instead of `labels`: the tokens, flattened, whose next token is supervised.
            targets: int64 [M], these next tokens. Training gives positions, so that the host never waits for the GPU.
            num_items_in_batch: divisor of the summed loss; default: this micro-batch's supervised tokens.
            skip_logits: give no logits where there is a loss, so that those of a whole micro-batch are never held; by
                default where `num_items_in_batch`, `cu_seqlens` or `targets` are given, as training does.
            cache: what an earlier pass has seen; `past_key_values` is another name of it.
            kwargs: for the language model, such as `output_hidden_states`.
        """
        if skip_logits is None:
            skip_logits = any(argument is not None for argument in (num_items_in_batch, cu_seqlens, targets))
        following = shift_labels
        if labels is not None and following is None:
            following = next_labels(labels, cu_seqlens)
        if following is not None and not torch.compiler.is_compiling():  # a graph's shapes do not depend on the data
            target_positions, targets = find_targets(following)
        has_loss = targets is not None or following is not None
        if use_cache is None and has_loss:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            visual_positions=visual_positions,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = token_losses = None
        if targets is not None:
            assert target_positions is not None, "targets comes with target_positions"
            loss, token_losses = self._loss(hidden, target_positions, targets, num_items_in_batch)
        elif following is not None:
            loss = self._compiled_loss(hidden, following, num_items_in_batch)
        if not has_loss or not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return AlignVLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            token_losses=token_losses,
        )

    def _loss(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss / number of items, the loss of every target [M])."""
        head = self.lm_head
        chosen = hidden.flatten(0, 1).index_select(0, positions)  # [M, D]
        token_losses = torch.empty_like(targets, dtype=wide_dtype(chosen.dtype))
        total = linear_cross_entropy(
            chosen, head.weight, targets, getattr(head, "bias", None), chunk=self.loss_chunk, token_losses=token_losses
        )
        return total / (max(1, len(targets)) if num_items is None else num_items), token_losses

    def _compiled_loss(
        self, hidden: torch.Tensor, following: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The same loss in a compiled graph, through the logits of all tokens."""
        logits = self.lm_head(hidden).to(wide_dtype(hidden.dtype)).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(
            logits, following.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return losses / ((following != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the model never says the placeholder of an image, for which there would be no pixels.

        A cache may be called `cache` in any version.
        """
        if "cache" in kwargs:
            kwargs[CACHE] = kwargs.pop("cache")
        return super().generate(*args, **{"suppress_tokens": [self.config.image_token_id], **kwargs})  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        *,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: Any = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; whoever computes the prompt sees its images, an assistant in assisted decoding too.

        Transformers counts no pass of an assistant as the first one, and would take the images out of it. It looks for
        `inputs_embeds` in this signature.
        """
        cache: Any = kwargs.get(CACHE)
        if not is_first_iteration and cache is not None and not cache.is_compileable:
            is_first_iteration = cache.get_seq_length() == 0
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in PyTorch; weights may have public names, as in checkpoints of earlier versions."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + module_name(name.removeprefix(prefix))] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
