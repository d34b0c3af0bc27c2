"""The paper's comparison of connectors: same backbones, same data, same steps, another connector."""

from __future__ import annotations

import math

from alignvlm.config.schema import Recipe
from alignvlm.connectors.options import AlignOptions, CAbstractorOptions, OvisOptions, PerceiverOptions
from alignvlm.model.network import build_network
from alignvlm.studies.cells.grid import Variant
from alignvlm.studies.results.published import connector_tables
from alignvlm.studies.results.records import Results
from alignvlm.studies.results.tables import Section
from alignvlm.studies.study import Study


class Connectors(Study):
    """Which connector reads best."""

    name = "connectors"
    title = "Connectors"
    question = (
        "Which connector reads best, everything else being equal? Backbones, data and their order, number of steps and "
        "learning rates are the recipe's for all of them (AlignVLM, arXiv 2502.01341, Tables 2 and 3)."
    )

    def variants(self, recipe: Recipe) -> list[Variant]:
        return connector_variants(recipe)

    def sections(self, results: Results) -> list[Section]:
        return [
            Section(
                "Published",
                "What the paper reports for models of 3 billion parameters on real benchmarks, in percent. Only the "
                "order of the connectors can be compared with a small model's.",
                connector_tables(),
                notes=["The paper states no settings of its baselines, and one run of each without error bars."],
            )
        ]


def align(recipe: Recipe) -> Variant:
    """The reference of all studies: ALIGN as the recipe has it."""
    is_align = isinstance(recipe.model.connector, AlignOptions)
    return Variant("align", () if is_align else ("model.connector.kind=align",), "the paper's ALIGN, as in the recipe")


def connector_variants(recipe: Recipe) -> list[Variant]:
    """All connectors, the reference first.

    They have their usual sizes, except where the recipe's model is smaller: no connector makes more visual tokens than
    ALIGN if their number is free, none is wider than the language model, and Ovis has no more words than it. Connectors
    that join patches themselves get them one by one.
    """
    dims = build_network(recipe).dims
    latents = min(PerceiverOptions().num_latents, dims.tokens_per_tile)
    words = min(OvisOptions().visual_vocab_size, dims.vocab_size)
    queries = math.isqrt(min(CAbstractorOptions().num_queries, dims.tokens_per_tile)) ** 2
    width = min(CAbstractorOptions().hidden_size, dims.hidden_size)
    unmerged = ("model.tiles.merge=1",) if recipe.model.tiles.merge > 1 else ()
    narrow = (f"hidden_size={dims.hidden_size}",) if dims.feature_size > dims.hidden_size else ()
    return [
        align(recipe),
        Variant(
            "align-released",
            (*align(recipe).overrides, *_options("activation=relu", "norm_output=true")),
            "ALIGN as the released low-resource code has it: ReLU before W2, LayerNorm behind the average",
        ),
        Variant("mlp", _options("kind=mlp"), "two linear layers with a GELU between them, as in LLaVA-1.5"),
        Variant(
            "ovis",
            _options("kind=ovis", f"visual_vocab_size={words}"),
            f"softmax over {words:,} learned visual words with a table of their own",
        ),
        Variant(
            "perceiver",
            _options("kind=perceiver", f"num_latents={latents}", *narrow),
            f"{latents} learned queries read each tile, as in LLaVA-NeXT",
        ),
        Variant(
            "h_reducer",
            (*_options("kind=h_reducer"), *unmerged),
            "each window of 1 x 4 patches becomes a visual token, as in DocOwl 1.5",
        ),
        Variant(
            "c_abstractor",
            (*_options("kind=c_abstractor", f"num_queries={queries}", f"hidden_size={width}"), *unmerged),
            f"convolutions around a pooling to {queries} visual tokens per tile, as in Honeybee",
        ),
    ]


def _options(*options: str) -> tuple[str, ...]:
    return tuple(f"model.connector.{option}" for option in options)


STUDY = Connectors()
