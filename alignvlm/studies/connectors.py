"""The paper's comparison of connectors: same backbones, same data, same steps, another connector."""

from __future__ import annotations

from alignvlm.config.schema import Recipe
from alignvlm.connectors.options import AlignOptions, PerceiverOptions
from alignvlm.model.build import tiling_of
from alignvlm.studies.results.published import connector_tables
from alignvlm.studies.results.records import Results
from alignvlm.studies.results.tables import Section
from alignvlm.studies.study import Study, Variant


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

    A connector whose number of visual tokens is free makes its usual one, or ALIGN's where that is lower.
    """
    tokens = tiling_of(recipe).tokens_per_tile
    latents = min(PerceiverOptions().num_latents, tokens)
    return [
        align(recipe),
        Variant("mlp", ("model.connector.kind=mlp",), "two linear layers with a GELU between them, as in LLaVA-1.5"),
        Variant("ovis", ("model.connector.kind=ovis",), "softmax over learned visual words with a table of their own"),
        Variant(
            "perceiver",
            ("model.connector.kind=perceiver", f"model.connector.num_latents={latents}"),
            f"{latents} learned queries read each tile",
        ),
    ]


STUDY = Connectors()
