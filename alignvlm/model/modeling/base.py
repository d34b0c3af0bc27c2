"""Vision encoder, connector and decoder as one model without a head; what both models tell transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from alignvlm.connectors import Connector, Sizes, build_connector
from alignvlm.connectors.windows import join_windows
from alignvlm.errors import UserError
from alignvlm.exports import FoundInPackage
from alignvlm.model.attention import PACKED, SDPA, Documents
from alignvlm.model.backbones import keep_channels_last, remove_final_norm
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.parts import part_of, public_name

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the installed transformers calls a cache, as an argument and in outputs: `cache` from 5.24 on."""


class AlignVLMPreTrainedModel(FoundInPackage, PreTrainedModel):
    """What both models tell transformers about themselves."""

    config_class = AlignVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012  (transformers' convention)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, under the modules' own names.

        transformers would save the names of an older format where the model was loaded from one.
        """
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; the connector keeps the rows for which it was built, and never takes a new one.

        Raises:
            ValueError: fewer rows than these.
        """
        base: Any = self.base_model
        rows: int = base.connector.sizes.vocab_size
        multiple = pad_to_multiple_of or 1
        if new_num_tokens is not None and -(-new_num_tokens // multiple) * multiple < rows:
            raise ValueError(
                f"{new_num_tokens} rows of the embedding: the connector was built for {rows}, keep at least these "
                f"(token ids below {rows} need no new row)"
            )
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.connector_vocab_size = rows if rows < self.config.text_config.vocab_size else None
        return embedding

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """As in transformers, which calls it after loading; weights that the connector lacks are an error here.

        Raises:
            UserError: the weights are not those of the connector that the config names.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        lacking = sorted(public_name(n) for n in loading_info.missing_and_mismatched() if part_of(n) == "connector")
        if not lacking:
            return
        for found in vars(loading_info).values():
            found.clear()  # transformers would print all of them as a table
        base: Any = self.base_model
        advice = base.connector.older_exports or "give the config that belongs to these weights"
        raise UserError(
            f"{self.config.name_or_path}: its connector_config in config.json names the kind "
            f"{self.config.connector.kind!r}, but its weights lack {', '.join(lacking[:3])}"
            f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}; {advice}"
        )


class AlignVLMModel(AlignVLMPreTrainedModel):
    """`concat(connector(vision_tower(tiles)), E_text(tokens))` into a decoder without head (arXiv 2502.01341)."""

    def __init__(
        self,
        config: AlignVLMConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        """Backbones that exist already are given; without them they are built from the config."""
        super().__init__(config)
        text, merge = config.text_config, config.tiles_config["merge"]
        self.vision_tower = vision_tower if vision_tower is not None else AutoModel.from_config(config.vision_config)
        self.language_model = language_model if language_model is not None else AutoModel.from_config(text)
        if not config.final_norm:
            remove_final_norm(self.vision_tower)
        keep_channels_last(self.vision_tower)
        feature_size = config.vision_config.hidden_size * merge**2
        rows = config.connector_vocab_size or text.vocab_size
        sizes = Sizes(feature_size, text.hidden_size, rows, config.features_per_side)
        self.connector: Connector = build_connector(config.connector, sizes)
        self.gathered_embedding: torch.Tensor | None = None
        """All rows of the input embedding, where a server gives this process only some of them to look up."""
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the connector and its modules; the backbones are models of their own and initialise themselves."""
        if isinstance(module, Connector):
            module.reset_parameters()
        elif not self.connector.reset_layer(module):
            super()._init_weights(module)

    def part(self, name: str) -> nn.Module:
        """`vision`, `connector` or `language`: the encoder, the connector, the decoder."""
        return {"vision": self.vision_tower, "connector": self.connector, "language": self.language_model}[name]

    @property
    def connector_embedding(self) -> torch.Tensor:
        """The rows [V, D] of the input embedding for which the connector was built."""
        table: Any = self.get_input_embeddings().weight if self.gathered_embedding is None else self.gathered_embedding
        rows = self.connector.sizes.vocab_size
        return table[:rows] if len(table) > rows else table  # some were added, or a server pads the table

    def encode_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision features of tiles, neighbours merged: [K, 3, S, S] (uint8, or floats already normalised) to [K, T, d].

        A vision encoder without trainable parameters keeps no activations.
        """
        return self._merged(self._look_at(pixel_values).last_hidden_state)

    def _look_at(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """The vision encoder's output for such tiles."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values / 255
            # Numbers instead of tensors of them: a tensor would have to be copied to the GPU, which waits.
            for channel, (mean, std) in enumerate(zip(self.config.image_mean, self.config.image_std, strict=True)):
                pixel_values[:, channel].sub_(mean).div_(std)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained):
            return self.vision_tower(pixel_values=pixel_values.to(self.vision_tower.dtype), **kwargs)

    def _merged(self, features: torch.Tensor) -> torch.Tensor:
        features = features[:, -(self.config.patches_per_side**2) :]  # class tokens, where there are any, come first
        merge = self.config.tiles_config["merge"]
        return join_windows(features, (merge, merge))

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Tiles as visual tokens: `pooler_output` is what the connector makes of [K, 3, S, S], [K, T', D].

        The other fields are the vision encoder's own, `hidden_states` and `attentions` where `kwargs` ask for them.
        """
        seen = self._look_at(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=self.connector(self._merged(seen.last_hidden_state), self.connector_embedding),
            hidden_states=seen.get("hidden_states"),
            attentions=seen.get("attentions"),
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        visual_positions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Input embeddings [B, T, D]: text embeddings with the visual tokens put into their places.

        Raises:
            ValueError: when the visual tokens in `input_ids` are not as many as the tiles give.
        """
        is_visual = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        return self._with_images(embeds, is_visual, pixel_values, visual_positions, image_features)

    def _is_placeholder(self, embeds: torch.Tensor) -> torch.Tensor:
        """Where embeddings [B, T, D] are those of the image's placeholder, bool [B, T].

        Raises:
            ValueError: the placeholder has no row in the embedding.
        """
        embedding: Any = self.get_input_embeddings()
        placeholder = self.config.image_token_id
        if placeholder >= embedding.num_embeddings:
            raise ValueError(
                f"pixel_values with inputs_embeds: the embedding has no row for image_token_id ({placeholder}), "
                "where images would stand; give input_ids"
            )
        return (embeds == embedding(torch.tensor(placeholder, device=embeds.device)).to(embeds.dtype)).all(-1)

    def _with_images(
        self,
        embeds: torch.Tensor,
        is_visual: torch.Tensor,
        pixel_values: torch.Tensor | None,
        visual_positions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, T, D] with the visual tokens where `is_visual` [B, T] holds.

        In training, and where `visual_positions` are given, the vision encoder and the connector are called exactly
        once whatever the batch holds: a dummy tile of weight zero stands in for images, so that all ranks make the
        same collective calls under ZeRO-3.

        Args:
            visual_positions: int64 [N], the places of the visual tokens in the flattened `input_ids`; without it they
                are looked up, for which the host waits for the GPU.
            image_features: visual tokens [K, T', D] that were computed before, instead of `pixel_values`.
        """
        needs_tiles = self.training or visual_positions is not None
        if image_features is None and pixel_values is not None and len(pixel_values) > 0:
            image_features = self.get_image_features(pixel_values, return_dict=True).pooler_output
        visual = embeds.new_empty(0, embeds.shape[-1])
        if image_features is not None:
            visual = image_features.flatten(0, 1).to(embeds.device, embeds.dtype)  # [N, D]
        # A compiled graph would end here, and be compiled anew for each way to come to its parts.
        if not torch.compiler.is_compiling():
            wanted = is_visual.sum() if visual_positions is None else len(visual_positions)
            if wanted != len(visual):
                given = "no tiles in pixel_values" if image_features is None else f"the tiles give {len(visual)}"
                raise ValueError(
                    f"{int(wanted)} visual tokens in the input, but {given}: encode text and images with this model's "
                    "processor"
                )
        if image_features is None:
            return embeds + self._dummy_tile(embeds) if needs_tiles else embeds
        if visual_positions is None:
            return embeds.masked_scatter(is_visual[..., None], visual)
        return embeds.flatten(0, 1).index_copy(0, visual_positions, visual).view_as(embeds)

    def _dummy_tile(self, embeds: torch.Tensor) -> torch.Tensor:
        """Zero, computed through the vision encoder and the connector; scalar of the embeddings' dtype."""
        size = self.config.vision_config.image_size
        tile = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=embeds.device)
        return 0.0 * self.get_image_features(tile, return_dict=True).pooler_output.sum().to(embeds.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        visual_positions: torch.Tensor | None = None,
        mm_encoder_outputs: Mapping[str, BaseModelOutputWithPooling] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """One pass through the decoder; see `AlignVLMForConditionalGeneration.forward` for the arguments.

        Raises:
            ValueError: arguments that exclude each other.
        """
        seen = (mm_encoder_outputs or {}).get("image")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values is not None and seen is not None:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        if past_key_values is not None and cache is not None:
            raise ValueError("give cache or past_key_values, not both: they are names of one argument")
        cache = past_key_values if cache is None else cache
        features = None if seen is None else seen.pooler_output
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values, visual_positions, features)
        assert inputs_embeds is not None
        if input_ids is None and (pixel_values is not None or features is not None):
            placeholders = self._is_placeholder(inputs_embeds)
            inputs_embeds = self._with_images(inputs_embeds, placeholders, pixel_values, None, features)
        if cu_seqlens is not None:
            if position_ids is None or attention_mask is not None or cache is not None:
                raise ValueError("cu_seqlens comes with position_ids, without attention_mask and cache")
            kwargs |= self._packed(cu_seqlens, max_seqlen, inputs_embeds.device, kwargs.get("use_cache"))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )

    def _packed(
        self, cu_seqlens: torch.Tensor, max_seqlen: int | None, device: torch.device, use_cache: bool | None
    ) -> dict[str, Any]:
        """What the decoder gets beside the positions, so that the documents of a micro-batch do not see each other."""
        assert max_seqlen is not None, "cu_seqlens comes with max_seqlen"
        if use_cache:
            raise ValueError("packed documents (cu_seqlens) have no cache: leave use_cache out")
        if not self.language_model._supports_attention_backend:
            raise ValueError(
                f"{type(self.language_model).__name__} has an attention of its own, where packed documents would see "
                "each other: take a language model that lets transformers choose its attention"
            )
        implementation = self.language_model.config._attn_implementation
        if len(cu_seqlens) > 2 and implementation not in PACKED:
            raise ValueError(
                f"packed documents (cu_seqlens) would see each other in the attention {implementation!r} of some "
                f"language models: call model.get_decoder().set_attn_implementation({SDPA!r})"
            )
        documents = Documents.of(cu_seqlens, max_seqlen, implementation)
        return {"documents": documents.to(device), "use_cache": False}
