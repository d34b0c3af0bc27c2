"""Noise on the vision features of trained models: what it costs every connector, and how far it moves their outputs."""

from __future__ import annotations

from typing import Any

from alignvlm.config.schema import Recipe
from alignvlm.report.points import Points, draw_points
from alignvlm.studies.analysis import evaluation_place, held_out_images, kept, scores_of, task_settings, without_gallery
from alignvlm.studies.cells.grid import Cell, Variant
from alignvlm.studies.connectors import connector_variants
from alignvlm.studies.results.published import NOISE
from alignvlm.studies.results.records import Record, Results
from alignvlm.studies.results.statistics import Estimate
from alignvlm.studies.results.tables import Section, Table, shown
from alignvlm.studies.study import Study

RELATIVE = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Sigmas in units of the features' own standard deviation."""
PAPER = 3.0
"""The paper's sigma, whatever the features' scale."""
LEVELS = (*(f"{factor:g}×" for factor in RELATIVE), f"σ = {PAPER:g}")
IMAGES = 64
"""Images whose visual tokens are compared, evenly spread over the tasks."""


class Noise(Study):
    """Which connector passes on least of it."""

    name = "noise"
    title = "Noise on the vision features"
    question = (
        "What does Gaussian noise on the vision features cost at evaluation, connector by connector, and how far does "
        "it move the visual tokens? Trained without noise; the models are those of the study `connectors`."
    )

    def variants(self, recipe: Recipe) -> list[Variant]:
        return connector_variants(recipe)

    def analyse(self, cell: Cell) -> dict[str, Any]:
        settings = [list(RELATIVE), PAPER, IMAGES, task_settings(cell.recipe)]
        return kept(cell, "noise", settings, lambda: _measure(cell))

    def sections(self, results: Results) -> list[Section]:
        names = [variant.name for variant in results.grid.variants if results.of(variant.name)]
        if not names:
            return []
        return [_scores(results, names), _distances(results, names), _published()]


def _measure(cell: Cell) -> dict[str, Any]:
    """Scores and distances at every level. Levels that are evaluated already are not evaluated again."""
    from alignvlm.evaluation.answering import ModelAnswerer
    from alignvlm.evaluation.evaluate import evaluate
    from alignvlm.studies.feature_noise import feature_noise, measure_scale, output_distances

    images = held_out_images(cell.recipe, IMAGES)
    export, recipe = cell.last_stage.export, without_gallery(cell.recipe)
    answerer = ModelAnswerer.load(export)
    scale = measure_scale(answerer.model, answerer.processor, images)
    sigmas = [*(factor * scale.features for factor in RELATIVE), PAPER]
    distances = output_distances(answerer.model, answerer.processor, images, sigmas, scale.mean_output)
    levels = []
    for name, sigma, (plain, centred) in zip(LEVELS, sigmas, distances, strict=True):
        place = evaluation_place(cell, "noise") / f"sigma-{sigma:.6g}"
        with feature_noise(answerer.model, sigma):
            scores = scores_of(evaluate(export, recipe, place, answerer=answerer, progress=True))
        levels.append({"level": name, "sigma": sigma, "cosine": plain, "centred_cosine": centred, "scores": scores})
    return {
        "feature_std": scale.features,
        "images": scale.num_images,
        "visual_tokens": scale.num_visual_tokens,
        "levels": levels,
    }


def _at(level: int, key: str) -> Any:
    return lambda record: record.analysis["levels"][level][key] if record.analysis else None


def _clean(record: Record) -> float | None:
    """The plain mean of the tasks' scores without noise, as `_noisy` takes them."""
    tasks = record.analysis["levels"][0]["scores"] if record.analysis else {}
    return sum(record.scores[task] for task in tasks) / len(tasks) if tasks and record.has(tasks) else None


def _noisy(level: int) -> Any:
    def mean(record: Record) -> float | None:
        scores = record.analysis["levels"][level]["scores"] if record.analysis else {}
        return sum(scores.values()) / len(scores) if scores else None

    return mean


def _scores(results: Results, names: list[str]) -> Section:
    columns = [_clean, *(_noisy(level) for level in range(len(LEVELS)))]
    rows = [(name, *(shown(results.mean(name, column)) for column in columns)) for name in names]
    scale = [(name, shown(results.mean(name, lambda r: r.analysis.get("feature_std")), 3, 1.0)) for name in names]
    figure = draw_points(
        Points("Score under noise", _lines(results, names, columns, 100), "σ in units of the features' own", zero=True)
    )
    return Section(
        "Scores under noise",
        "Plain mean of the tasks' scores, percent; σ in units of the standard deviation of the model's own features, "
        f"and in the last column σ = {PAPER:g} as in the paper.",
        [Table(("Average score, %", "no noise", *LEVELS), rows), Table(("Features", "standard deviation"), scale)],
        [figure] if figure else [],
        notes=["The noise of a tile depends on its pixels alone, and for all σ differs in its size only."],
    )


def _lines(
    results: Results, names: list[str], columns: list[Any], factor: float
) -> dict[str, list[tuple[float, float]]]:
    """Points over 0 and RELATIVE."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        means = [results.mean(name, column) for column in columns[: len(RELATIVE) + 1]]
        found[name] = [(x, factor * each.mean) for x, each in zip((0.0, *RELATIVE), means, strict=True) if each]
    return found


def _distances(results: Results, names: list[str]) -> Section:
    def table(head: str, key: str) -> Table:
        cells = [(name, *(_distance(results.mean(name, _at(i, key))) for i in range(len(LEVELS)))) for name in names]
        return Table((head, *LEVELS), cells)

    return Section(
        "How far the visual tokens move",
        f"Mean cosine distance between clean and noisy visual tokens, over {IMAGES} held-out images.",
        [table("Cosine distance", "cosine"), table("Mean token subtracted", "centred_cosine")],
        notes=[
            "Visual tokens that all lie near one mean have a small cosine distance whatever noise does to them. The "
            "second table subtracts the mean clean visual token from both: it compares what tells the tokens apart."
        ],
    )


def _distance(value: Estimate | None) -> str:
    return shown(value, 4, 1.0)


def _published() -> Section:
    rows = [(name, f"{clean:.2f}", f"{noisy:.2f}", f"{d:.4f}") for name, (clean, noisy, d) in NOISE.items()]
    head = ("Published", "Average without noise", f"σ = {PAPER:g}", "Cosine distance")
    return Section("Published", "AlignVLM on Llama-3.2-3B, nine benchmarks.", [Table(head, rows)])


STUDY = Noise()
