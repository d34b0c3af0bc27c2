"""Names and defaults resolved once: afterwards a stage, a source and a task know their own name, place and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alignvlm.config.schema import Recipe

LOSS, TASK = "loss/", "task/"
"""How names of scores begin: `loss/<source>` and `loss/held_out`, `task/<name>`."""
HELD_OUT = f"{LOSS}held_out"
"""The loss over all held-out sources together."""


def with_names(recipe: Recipe) -> Recipe:
    """The recipe with every default filled that depends on another key or on the key itself."""
    root = recipe.data.root
    sources = {
        name: replace(source, name=name, path=source.path or name, folder=_folder(root, source.path or name))
        for name, source in recipe.data.sources.items()
    }
    stages = {
        name: replace(stage, name=name, number=number, deepspeed=stage.deepspeed or recipe.train.deepspeed)
        for number, (name, stage) in enumerate(recipe.stages.items(), 1)
    }
    tasks = {
        name: replace(task, name=name, source=task.source or name) for name, task in recipe.evaluation.tasks.items()
    }
    texts = {name: replace(text, name=name) for name, text in recipe.evaluation.text.items()}
    return replace(
        recipe,
        data=replace(recipe.data, sources=sources),
        stages=stages,
        evaluation=replace(recipe.evaluation, tasks=tasks, text=texts),
        tracking=replace(recipe.tracking, experiment=recipe.tracking.experiment or recipe.name),
    )


def _folder(root: str, path: str) -> str:
    if "://" in path:
        return path
    return f"{root.rstrip('/')}/{path}" if "://" in root else str(Path(root) / path)
