"""The Hugging Face config of a whole vision-language model: backbones, connector, tiling. No weights here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from alignvlm.config.schema import TilesConfig
from alignvlm.connectors import ConnectorOptions, connector_class, connector_options
from alignvlm.connectors.windows import num_windows
from alignvlm.exports import CLASSES, MODEL_TYPE, FoundInPackage, auto_map
from alignvlm.model.inputs.tiling import TilingSpec


class AlignVLMConfig(FoundInPackage, PreTrainedConfig):
    """Configuration of `AlignVLMForConditionalGeneration`.

    Args:
        vision_config: config (or its dict, with `model_type`) of a SigLIP-like vision model: square `image_size`,
            `patch_size`, one feature per patch.
        final_norm: whether features pass the final norm of the vision model.
        text_config: config (or its dict, with `model_type`) of any causal LM of transformers.
        connector_config: `kind` of the connector and the options of that kind.
        connector_vocab_size: rows of the embedding for which the connector was built; None: all. More were added then.
        tiles_config: `max_tiles`, `min_coverage`, `overview`, `merge`, the fields of `TilesConfig`.
        image_token_id: id that marks a visual token in `input_ids`. It may lie beyond the LM's embedding rows: it is
            never embedded and never predicted.
        image_mean, image_std: channel normalisation of pixels in [0, 1].
        tie_word_embeddings: as in `text_config`, whatever is given.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache", "token_losses"]  # noqa: RUF012
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  (transformers' convention)

    vision_config: Any = None
    final_norm: bool = True
    text_config: Any = None
    connector_config: Any = None
    connector_vocab_size: int | None = None
    tiles_config: Any = None
    image_token_id: int = 0
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(self.vision_config, "siglip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.connector_config = asdict(connector_options(self.connector_config or {}))
        self.tiles_config = asdict(TilesConfig()) | (self.tiles_config or {})
        self.image_mean = self.image_mean or [0.5, 0.5, 0.5]
        self.image_std = self.image_std or [0.5, 0.5, 0.5]
        super().__post_init__(**kwargs | {"auto_map": auto_map(*CLASSES)})

    @property
    def connector(self) -> ConnectorOptions:
        """The connector's options."""
        return connector_options(self.connector_config)

    @property
    def patches_per_side(self) -> int:
        """Patches per side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def features_per_side(self) -> int:
        """Features per side of a tile that enter the connector: patches, or blocks of merge x merge of them.

        Raises ValueError when a block is larger than a tile.
        """
        patches, merge = self.patches_per_side, self.tiles_config["merge"]
        if merge > patches:
            raise ValueError(
                f"tiles.merge = {merge} is more than the {patches} patches of a tile's side "
                f"(image_size {self.vision_config.image_size} / patch_size {self.vision_config.patch_size})"
            )
        return num_windows(patches, merge)

    @property
    def tiling(self) -> TilingSpec:
        """How this model cuts images; the processor and the data index use the same."""
        options = self.connector
        tokens_per_tile = connector_class(options.kind).tokens_per_tile(options, self.features_per_side)
        fields = {name: self.tiles_config[name] for name in ("max_tiles", "min_coverage", "overview")}
        return TilingSpec(self.vision_config.image_size, tokens_per_tile, **fields)


def _sub_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {})
    return AutoConfig.for_model(fields.pop("model_type", default), **fields)
