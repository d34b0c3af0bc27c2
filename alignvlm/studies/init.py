"""How ALIGN starts: gain, temperature, LayerNorms and W2, one changed at a time. The paper has no such ablation."""

from __future__ import annotations

from alignvlm.config.schema import Recipe
from alignvlm.connectors.options import AlignOptions
from alignvlm.errors import UserError
from alignvlm.studies.cells.grid import Variant
from alignvlm.studies.connectors import align
from alignvlm.studies.study import Study

GAINS = (0.25, 0.5, 1.0, 2.0, 4.0)
TEMPERATURES = (0.5, 2.0)
"""Times the recipe's own."""


class Init(Study):
    """Which start of ALIGN learns soonest."""

    name = "init"
    title = "Start of ALIGN"
    question = (
        "Which start of the ALIGN connector learns soonest? One setting at a time differs from the recipe's own. With "
        "gain 1 and no temperature, as in the paper, the softmax over a large vocabulary begins almost uniform."
    )

    def variants(self, recipe: Recipe) -> list[Variant]:
        options = recipe.model.connector
        if not isinstance(options, AlignOptions):
            raise UserError(f"study init varies the ALIGN connector; recipe {recipe.name} has {options.kind}")
        gains = [gain for gain in GAINS if gain != options.gain and options.norm_vocab]
        switches = [name for name in ("norm_hidden", "norm_vocab") if getattr(options, name)]
        return [
            align(recipe),
            *(
                _changed("gain", f"{gain:g}", "gamma of the LayerNorm over the vocabulary at the start")
                for gain in gains
            ),
            *(
                _changed("temperature", f"{factor * options.temperature:g}", "divisor of the logits")
                for factor in TEMPERATURES
            ),
            *(_changed(name, "false", "without this LayerNorm") for name in switches),
            *([] if options.norm_output else [_changed("norm_output", "true", "LayerNorm behind the average")]),
            *([] if options.w2_start == "random" else [_changed("w2_start", "random", "W2 is no copy of the LM head")]),
        ]


def _changed(option: str, value: str, note: str) -> Variant:
    slug = {"false": f"no_{option}", "true": option}.get(value, f"{option}-{value}")
    return Variant(slug, (f"model.connector.{option}={value}",), note)


STUDY = Init()
