"""The Hugging Face folder of a model: written as a whole, checked before it is loaded. Knows no model class.

Its files name the model's classes under `auto_map`, so that transformers finds them with `trust_remote_code=True` and
without an import of this package: in a file of one line, which imports them from there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.exports.card import CARD, STAGE_FOLDER, model_card
from data_pipeline.files import has_shape, must_write, read_needed

MODEL_TYPE = "alignvlm"
"""What `config.json` of an export says."""
NEEDED = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
ADAPTER = "adapter"
"""Folder in an export with the adapters of its stage, where it had any, as PEFT saves them."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
CLASSES_FILE = "alignvlm_classes.py"
CLASSES = {
    "AutoConfig": "AlignVLMConfig",
    "AutoImageProcessor": "AlignVLMImageProcessor",
    "AutoModel": "AlignVLMModel",
    "AutoModelForImageTextToText": "AlignVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "AlignVLMForConditionalGeneration",
    "AutoProcessor": "AlignVLMProcessor",
}
"""transformers' Auto class -> the class of `alignvlm.model` that it loads."""


def auto_map(*kinds: str) -> dict[str, str]:
    """Where transformers finds the classes of these kinds: in CLASSES_FILE of the folder."""
    return {kind: f"{Path(CLASSES_FILE).stem}.{CLASSES[kind]}" for kind in kinds}


class FoundInPackage:
    """A class that transformers loads from this package, wherever it was saved."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: transformers would copy the class's source file into every folder that it is saved in."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the file that the saved `auto_map` names."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        names = ", ".join(sorted(set(CLASSES.values())))
        Path(save_directory, CLASSES_FILE).write_text(f"from alignvlm.model import {names}\n", encoding="utf-8")
        return saved


def save_export(model: Any, weights: dict[str, Any], processor: Any, folder: Path, adapters: Any = None) -> None:
    """Write the folder under another name and rename it: it is complete or does not exist.

    Args:
        adapters: those that are merged into the weights (`model.lora.Adapters`); they get a folder in this one.

    Raises:
        DataError: it cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    partial = folder.with_name(folder.name + ".partial")
    with must_write(folder, "free some space or make the folder writable; the same command writes it then"):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            card = model_card(model, weights, folder)  # before the weights are written, which empties the dictionary
            if adapters is not None:
                adapters.save(partial / ADAPTER, model, weights)
            model.save_pretrained(partial, state_dict=weights)
            processor.save_pretrained(partial)
            (partial / CARD).write_text(card, encoding="utf-8")
            _follow_umask(partial)
            partial.rename(folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_export(folder: Path) -> None:
    """Make sure that a folder holds a whole export; reads its JSON files and the headers of its weights.

    Raises:
        UserError: it holds no exported model. DataError: a file of it is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        near = _export_below(folder) or "runs/<name>/<n>-<stage>/export"
        raise UserError(f"{folder} is not an export folder (no config.json); give {near}")
    way_out = _way_out(folder)
    config = read_needed(folder / "config.json", _read_object, way_out)
    if config.get("model_type") != MODEL_TYPE:
        kind = config.get("model_type")
        raise UserError(f"{folder} holds a model of type {kind!r}, not an export; give runs/<name>/<n>-<stage>/export")
    for path in sorted({folder / name for name in NEEDED} | set(folder.glob("*.json"))):
        read_needed(path, _read_object, way_out)
    names = [WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        names = read_needed(folder / WEIGHTS_INDEX, _read_index, way_out)
    for name in names:
        read_needed(folder / name, read_tensor_places, way_out)


def _export_below(folder: Path) -> Path | None:
    """The export of a stage's folder, or the newest of a run's."""
    found: dict[int, Path] = {}
    for config in [*folder.glob("export/config.json"), *folder.glob("*/export/config.json")]:
        if stage := STAGE_FOLDER.fullmatch(config.absolute().parents[1].name):
            found[int(stage[1])] = config.parent
    return found[max(found)] if found else None


def _way_out(folder: Path) -> str:
    match = STAGE_FOLDER.fullmatch(folder.absolute().parent.name)
    if match is None:
        return "copy the export again"
    again = (
        f"takes stage {match[2]} again from its last checkpoint" if int(match[1]) else "builds the first model again"
    )
    return f"remove {folder} and start the run again, which {again}"


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _read_index(path: Path) -> list[str]:
    """Names of the files that share the weights."""
    content = _read_object(path)
    if not has_shape(content, {"weight_map": {str: str}}) or any("/" in n for n in content["weight_map"].values()):
        raise ValueError("it does not name the files of the weights")
    return sorted(set(content["weight_map"].values()))


def read_tensor_places(path: Path) -> tuple[int, dict[str, Any]]:
    """(first byte of the numbers, {name: dtype, shape, offsets}) of a safetensors file whose size is right.

    Its parts are 8 bytes of length, JSON with the tensors' places, numbers. Raises what damage makes it raise.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"its header is cut off, it has {size:,} bytes")
        header = json.loads(file.read(length))
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if size != end:
        raise ValueError(f"it has {size:,} bytes and should have {end:,}")
    return 8 + length, tensors


def _follow_umask(folder: Path) -> None:
    """Give all files the mode that a new file gets here: safetensors creates its own readable for the owner only."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
