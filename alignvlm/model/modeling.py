"""The vision-language model: vision encoder, connector and causal LM as one Hugging Face model.

The same forward pass serves training on packed documents (`labels`, `cu_seqlens`), evaluation and `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from alignvlm.connectors import Connector, Sizes, build_connector
from alignvlm.connectors.windows import join_windows
from alignvlm.errors import UserError
from alignvlm.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from alignvlm.kernels.matmul import wide_dtype
from alignvlm.model.attention import Documents
from alignvlm.model.configuration import AlignVLMConfig

FINAL_NORMS = ("post_layernorm", "layernorm", "norm")
"""What vision encoders of transformers call the norm behind their layers (SigLIP and CLIP; ViT and DINOv2; DINOv3)."""


@dataclass
class AlignVLMOutput(ModelOutput):
    """What a forward pass returns: `loss` where labels were given, else `logits`."""

    loss: torch.Tensor | None = None
    """Sum of the token losses divided by `num_items_in_batch` (or their mean), fp32 scalar."""
    logits: torch.Tensor | None = None
    """[B, T, V]; None where labels were given: logits of a whole micro-batch are never held."""
    past_key_values: Any = None
    token_losses: torch.Tensor | None = None
    """[M], where labels were given: the cross entropy of every target, fp32, without a gradient."""


class AlignVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`concat(connector(vision(tiles)), E_text(tokens))` into a causal LM (AlignVLM, arXiv 2502.01341)."""

    config_class = AlignVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012  (transformers' convention)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: AlignVLMConfig, vision: PreTrainedModel | None = None, language: PreTrainedModel | None = None
    ) -> None:
        """`vision` and `language` are backbones that exist already; without them they are built from the config."""
        super().__init__(config)
        self.vision = vision if vision is not None else AutoModel.from_config(config.vision_config)
        self.language = language if language is not None else AutoModelForCausalLM.from_config(config.text_config)
        if not config.final_norm:
            _remove_final_norm(self.vision)
        text, merge = config.text_config, config.tiles_config["merge"]
        feature_size = config.vision_config.hidden_size * merge**2
        sizes = Sizes(feature_size, text.hidden_size, text.vocab_size, config.features_per_side)
        patches = self.vision.get_input_embeddings()
        if isinstance(patches, nn.Conv2d):
            patches.register_forward_hook(_channels_last)
        self.connector: Connector = build_connector(config.connector, sizes)
        self.loss_chunk = 2048
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Of the connector and what lies in it: backbones are models of their own."""
        if isinstance(module, Connector):
            module.reset_parameters()
        elif not self.connector.reset_layer(module):
            super()._init_weights(module)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """As in transformers, which calls it after loading; weights that the connector lacks are an error here.

        Raises:
            UserError: the weights are not those of the connector that the config names.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        lacking = sorted(n for n in loading_info.missing_and_mismatched() if n.startswith("connector."))
        if not lacking:
            return
        for found in vars(loading_info).values():
            found.clear()  # transformers would print all of them as a table
        advice = self.connector.older_exports or "give the config that belongs to these weights"
        raise UserError(
            f"{self.config.name_or_path}: its connector_config in config.json names the kind "
            f"{self.config.connector.kind!r}, but its weights lack {', '.join(lacking[:3])}"
            f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}; {advice}"
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language.get_output_embeddings()

    def encode_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision features of tiles, neighbours merged: [K, 3, S, S] (uint8, or floats already normalised) to [K, T, d].

        A vision encoder without trainable parameters keeps no activations.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values / 255
            # Numbers instead of tensors of them: a tensor would have to be copied to the GPU, which waits.
            for channel, (mean, std) in enumerate(zip(self.config.image_mean, self.config.image_std, strict=True)):
                pixel_values[:, channel].sub_(mean).div_(std)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(trained):
            features = self.vision(pixel_values=pixel_values.to(self.vision.dtype)).last_hidden_state
        features = features[:, -(self.config.patches_per_side**2) :]  # class tokens, where there are any, come first
        merge = self.config.tiles_config["merge"]
        return join_windows(features, (merge, merge))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Connector outputs of tiles: [K, 3, S, S] to [K, T', D]."""
        return self.connector(self.encode_tiles(pixel_values), self.get_input_embeddings().weight)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        visual_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Input embeddings [B, T, D]: text embeddings with the visual tokens put into their places.

        In training, and where `visual_positions` are given, the vision encoder and the connector are called exactly
        once whatever the batch holds: a dummy tile of weight zero stands in for images, so that all ranks make the
        same collective calls under ZeRO-3.

        Args:
            visual_positions: int64 [N], the places of the visual tokens in the flattened `input_ids`; without it they
                are looked up, for which the host waits for the GPU.

        Raises:
            ValueError: when the visual tokens in `input_ids` are not as many as the tiles give.
        """
        needs_tiles = self.training or visual_positions is not None
        is_visual = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        if visual_positions is None:
            visual_positions = is_visual.flatten().nonzero().squeeze(1)
        num_visual = len(visual_positions)
        if pixel_values is None or len(pixel_values) == 0:
            if num_visual:
                raise ValueError(f"{num_visual} visual tokens in input_ids, but no tiles in pixel_values")
            return embeds + self._dummy_tile(embeds) if needs_tiles else embeds
        features = self.get_image_features(pixel_values)
        if features.shape[0] * features.shape[1] != num_visual:
            raise ValueError(
                f"{num_visual} visual tokens in input_ids, but {features.shape[0]} tiles give "
                f"{features.shape[0] * features.shape[1]}: encode text and images with this model's processor"
            )
        visual = features.flatten(0, 1).to(embeds.dtype)  # [N, D]
        return embeds.flatten(0, 1).index_copy(0, visual_positions, visual).view_as(embeds)

    def _dummy_tile(self, embeds: torch.Tensor) -> torch.Tensor:
        """Zero, computed through the vision encoder and the connector; scalar of the embeddings' dtype."""
        size = self.config.vision_config.image_size
        tile = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=embeds.device)
        return 0.0 * self.get_image_features(tile).sum().to(embeds.dtype)

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
        **kwargs: Any,
    ) -> AlignVLMOutput:
        """One pass.

        Args:
            input_ids: [B, T]; visual tokens are `config.image_token_id`.
            pixel_values: tiles of all images in reading order, [K, 3, S, S], uint8 or normalised floats.
            labels: [B, T], -100 where unsupervised, not shifted; gives a loss instead of logits.
            cu_seqlens: int32 [num_documents + 1] for a packed micro-batch (B = 1), with `max_seqlen`, and
                `position_ids` [1, T] that restart in every document. Best on the host, where it is read.
            visual_positions: int64 [N], where the visual tokens are in the flattened `input_ids`.
            target_positions: int64 [M], instead of `labels`: the tokens, flattened, whose next token is supervised.
            targets: int64 [M], these next tokens. Training gives positions, so that the host never waits for the GPU.
            num_items_in_batch: divisor of the summed loss; default: this micro-batch's supervised tokens.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, pixel_values, visual_positions)
        if cu_seqlens is not None:
            assert max_seqlen is not None, "cu_seqlens comes with max_seqlen"
            implementation = self.language.config._attn_implementation
            documents = Documents.of(cu_seqlens, max_seqlen, implementation)
            kwargs["documents"] = documents.to(inputs_embeds.device)
        if labels is not None:
            target_positions, targets = find_targets(labels, cu_seqlens)
        decoder = self.language.get_decoder()
        outputs = decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if targets is None else False,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if targets is not None:
            assert target_positions is not None, "targets comes with target_positions"
            loss, token_losses = self._loss(hidden, target_positions, targets, num_items_in_batch)
            return AlignVLMOutput(loss=loss, token_losses=token_losses)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden[:, kept])
        return AlignVLMOutput(logits=logits, past_key_values=outputs.past_key_values)

    def _loss(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss / number of items, the loss of every target [M])."""
        head: Any = self.get_output_embeddings()
        chosen = hidden.flatten(0, 1).index_select(0, positions)  # [M, D]
        token_losses = torch.empty_like(targets, dtype=wide_dtype(chosen.dtype))
        total = linear_cross_entropy(
            chosen, head.weight, targets, getattr(head, "bias", None), chunk=self.loss_chunk, token_losses=token_losses
        )
        return total / (max(1, len(targets)) if num_items is None else num_items), token_losses

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the model never says the placeholder of an image, for which there would be no pixels."""
        return super().generate(*args, **{"suppress_tokens": [self.config.image_token_id], **kwargs})  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, past_key_values: Any = None, pixel_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)  # type: ignore[misc]
        is_first = past_key_values is None or past_key_values.get_seq_length() == 0
        inputs["pixel_values"] = pixel_values if is_first else None
        return inputs


def _channels_last(module: nn.Module, inputs: object, patches: torch.Tensor) -> torch.Tensor:
    """Patch embeddings [K, d, h, w], each one's d numbers side by side in memory.

    Encoders make [K, h w, d] of them without copying. Otherwise this layout, where these numbers lie far apart, would
    stay that of every residual sum, and each LayerNorm would copy its input.
    """
    return patches.contiguous(memory_format=torch.channels_last)


def _remove_final_norm(vision: nn.Module) -> None:
    """Let features leave a vision encoder as its last layer makes them."""
    found = [name for name in FINAL_NORMS if isinstance(getattr(vision, name, None), nn.Module)]
    if not found:
        raise ValueError(
            f"vision.feature_layer can only be -1: {type(vision).__name__} has no {', '.join(FINAL_NORMS)} to remove"
        )
    for name in found:
        setattr(vision, name, nn.Identity())


def find_targets(labels: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [M] in the flattened labels [B, T] whose next token, in the same document, is supervised; these [M]."""
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    if cu_seqlens is not None:
        following[0, cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    following = following.flatten()
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, following[positions]
