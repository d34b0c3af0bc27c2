"""Perplexity of an export's language model on held-out text: what training on images did to it.

Documents are read as EleutherAI's lm-evaluation-harness reads them for its rolling likelihoods: every token is
predicted once, behind the end-of-text token at first and in windows of `window` tokens after that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

from alignvlm.config.schema import Recipe
from alignvlm.config.sections.evaluation import TextConfig
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import find_device, load_export
from alignvlm.progress import Progress
from alignvlm.run_folder import WAY_OUT, EvaluationFolder
from alignvlm.system.ranks import ALONE, Ranks
from data_pipeline.checksums import digest, stamps
from data_pipeline.errors import DataError
from data_pipeline.files import must_write, read_json, read_needed, to_json, write_atomic, write_json_lines
from data_pipeline.samples.schema import SampleError

VERSION = 1
"""Raised when the numbers change, so that older results are computed again."""
ENTRY = {"perplexity?": float, "bits_per_byte?": float, "word_perplexity?": float, "documents": int, "tokens": int}
"""What text.json has of every text, for its readers; a number too large for floating point is null there."""
RANGE = 1000
"""Rows that are looked for at once."""


def measure_texts(
    model_folder: str | Path,
    recipe: Recipe,
    out_folder: str | Path,
    *,
    ranks: Ranks = ALONE,
    limit: int | None = None,
    progress: bool = False,
    device: Any = None,
) -> dict[str, Any]:
    """Measure an export folder on the texts of `evaluation.text`; every rank calls this and gets the same results.

    Every rank gets the same errors too. Rank i % size measures document i. A text is skipped when `<out>/text.json`
    already has it for the same model files, text and settings. Arguments are those of `evaluate.evaluate`.

    Returns:
        The content of text.json: {"model", "texts": {name: {"perplexity", "bits_per_byte", …}}}.

    Raises:
        UserError: a text without documents, or no model in the folder. DataError: a text cannot be read.
    """
    out, texts = EvaluationFolder(Path(out_folder)), recipe.evaluation.text
    entries, identities = ranks.of_main(_done, texts, Path(model_folder), out, limit)
    missing = [text for name, text in texts.items() if name not in entries]

    def measure() -> None:
        where = find_device(device)
        model, processor = load_export(Path(model_folder), where)
        model.loss_chunk = min(model.loss_chunk, 1024)
        for text in missing:
            part = out.part(f"text-{text.name}", ranks.rank, ranks.size)
            rows = _measure(text, model, processor.tokenizer, where, limit, ranks, progress)
            with must_write(part, WAY_OUT):
                part.parent.mkdir(parents=True, exist_ok=True)
                write_json_lines(part, [*({"document": row} for row in rows), {"documents": len(rows)}])

    def finish() -> None:
        for text in missing:
            parts = [out.part(f"text-{text.name}", number, ranks.size) for number in range(ranks.size)]
            rows = sorted(row for part in parts for row in read_needed(part, _read_part, "evaluate again"))
            entries[text.name] = summary(text, rows) | {"identity": identities[text.name]}
            for part in parts:
                part.unlink()
        results = {"model": str(model_folder), "texts": {name: entries[name] for name in texts}}
        with must_write(out.text, WAY_OUT):
            write_atomic(out.text, to_json(results, indent=2, ensure_ascii=False) + "\n")

    if missing:
        ranks.together(measure)
        ranks.of_main(finish)
    return ranks.of_main(read_texts, out)


def read_texts(folder: EvaluationFolder) -> dict[str, Any]:
    """Content of text.json; {} before the first text is measured, and with a warning when it is damaged."""
    return read_json(folder.text, {"model": str, "texts": {str: ENTRY}})


def text_identity(text: TextConfig) -> list[Any]:
    """Changes with the files and the settings of a text. Raises DataError when there is no such file."""
    return [VERSION, asdict(text), stamps(text_files(text))]


def text_files(text: TextConfig) -> list[Path]:
    """The files with a text's documents. Raises DataError when there are none."""
    from data_pipeline.importers.rows.files import find_files

    path = Path(text.path)
    if path.is_file() and path.suffix.lower() == ".txt":
        return [path]
    return cast(list[Path], find_files(path, text.split))


def documents(text: TextConfig) -> Iterator[str]:
    """The documents of a text in order: a whole `.txt` file, or one per row; rows of white space are left out.

    Raises:
        DataError: names the file and row that cannot be read or has no such field.
    """
    from data_pipeline.importers.rows.files import READERS

    for file in text_files(text):
        if file.suffix.lower() == ".txt":
            try:
                yield file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file}: not a text in UTF-8 ({error}); convert it, or give another file") from error
            continue
        reader = READERS[file.suffix.lower()]
        for begin, end, offset in reader.cut(file, RANGE):
            for number, row in enumerate(reader.read(file, begin, end, offset), begin + 1):
                if isinstance(row, SampleError):
                    raise DataError(f"{file}, row {number}: {row}")
                if not isinstance(row.get(text.field), str):
                    known = ", ".join(map(str, row)) or "none"
                    raise DataError(
                        f"{file}, row {number}: no text in the field {text.field!r} (fields: {known}); name it in "
                        f"evaluation.text.{text.name}.field"
                    )
                if row[text.field].strip():
                    yield row[text.field]


def windows(tokens: Sequence[int], first: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(input, targets) that predict every token once; the targets are what follows the input's last tokens.

    The first token is predicted from `first`. A window has at most `size` tokens; the last one is as long as the
    others where it can be, with tokens in front that are predicted already.
    """
    seen = [first, *tokens]
    for begin in range(0, len(tokens), size):
        end = min(begin + size, len(tokens))
        yield seen[max(0, end - size) : end], list(tokens[begin:end])


def negative_log_likelihood(model: Any, inputs: Sequence[int], targets: Sequence[int], device: Any) -> float:
    """Sum over the targets, in nats; no logits of a whole window are held."""
    import torch

    places = range(len(inputs) - len(targets), len(inputs))
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([list(inputs)], device=device),
            target_positions=torch.tensor(list(places), device=device),
            targets=torch.tensor(list(targets), device=device),
            num_items_in_batch=1,
        )
    return float(output.loss)


def summary(text: TextConfig, rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The scores of a text from (number, nats, tokens, words, bytes) of its documents.

    `perplexity` is per token of this model's tokenizer; `word_perplexity`, `byte_perplexity` and `bits_per_byte`
    compare models with different ones. Formulas and the count of words are those of lm-evaluation-harness.
    """
    if not rows:
        raise UserError(f"evaluation.text.{text.name}: {text.path} has no document; give a file with text")
    _, nats, tokens, words, size = (math.fsum(column) for column in zip(*rows, strict=True))
    return {
        "perplexity": _exp(nats / tokens),
        "word_perplexity": _exp(nats / words),
        "byte_perplexity": _exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
        "documents": len(rows),
        "tokens": int(tokens),
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _measure(
    text: TextConfig, model: Any, tokenizer: Any, device: Any, limit: int | None, ranks: Ranks, progress: bool
) -> list[list[float]]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError("the tokenizer has neither a token that begins a text nor one that ends it")
    most = min((n for n in (text.limit, limit) if n is not None), default=None)
    rows: list[list[float]] = []
    with Progress(f"perplexity {text.name}", None, enabled=progress and ranks.is_main, beat=ranks.beat) as bar:
        for number, document in islice(enumerate(documents(text)), ranks.rank, most, ranks.size):
            tokens = tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            nats = [negative_log_likelihood(model, *window, device) for window in windows(tokens, first, text.window)]
            if tokens:
                words = len(re.split(r"\s+", document))
                rows.append([number, math.fsum(nats), len(tokens), words, len(document.encode())])
            bar.advance(ranks.size)
    return rows


def _done(
    texts: dict[str, TextConfig], model_folder: Path, out: EvaluationFolder, limit: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(text -> its entry, where text.json has it already; text -> identity)."""
    model = stamps(sorted(model_folder.iterdir()) if model_folder.is_dir() else [])
    identities = {name: digest([model, text_identity(text), limit]) for name, text in texts.items()}
    known = read_texts(out).get("texts", {})
    entries = {name: known[name] for name in texts if known.get(name, {}).get("identity") == identities[name]}
    return entries, identities


def _read_part(path: Path) -> list[list[float]]:
    *rows, end = (json.loads(line) for line in path.read_bytes().splitlines())
    if end != {"documents": len(rows)}:
        raise ValueError("its end is missing")
    return [row["document"] for row in rows]
