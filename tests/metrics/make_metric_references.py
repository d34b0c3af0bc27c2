"""Writes metric_references.json: what two independent implementations say about the pairs below.

    pip install --no-deps --target DIR lmms-eval==0.7.3 anls-star==1.0.1 munkres
    PYTHONPATH=DIR python tests/metrics/make_metric_references.py

`lmms_eval` itself is not imported (its dependencies are heavy): its functions are compiled from its own source files.
Not a test, and not needed by the tests.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ANLS_PAIRS: list[tuple[str, list[str]]] = [
    ("42", ["42"]),
    ("42", ["43"]),
    ("4", ["42"]),
    ("", ["42"]),
    ("1,234.50", ["1,234.50", "$1,234.50"]),
    ("$1234.50", ["1,234.50", "$1,234.50"]),
    ("March 3, 1972", ["march 3 1972"]),
    ("march 3", ["March 3, 1972", "3/3/72"]),
    ("University of California, San Diego", ["university of california", "UCSD"]),
    ("The Coca-Cola Company", ["coca cola company", "the coca-cola company"]),
    ("ITC Limited", ["itc limited", "ITC"]),
    ("itc", ["itc limited"]),
    ("kitten", ["sitting"]),
    ("abcd", ["abxy"]),
    ("abc", ["xyz"]),
    ("ab", ["cb"]),
    ("Über", ["übers"]),
    ("été 1999", ["ete 1999"]),
    ("0.28", ["0.28%", "0.28 %"]),
    ("yes", ["no", "Yes"]),
    ("a b c d", ["abcd"]),
    ("日本語", ["日本"]),
    ("answer is 12", ["12"]),
    ("Department of Health and Human Services", ["department of health, education and welfare"]),
    ("T.F. Riehl", ["T.F. Riehl", "t. f. riehl"]),
]
RELAXED_PAIRS: list[tuple[str, str]] = [
    ("100", "100"),
    ("95", "100"),
    ("105", "100"),
    ("94.9", "100"),
    ("105.1", "100"),
    ("-95", "-100"),
    ("95", "-100"),
    ("0.475", "0.5"),
    ("47.5%", "0.5"),
    ("50%", "50"),
    ("50", "50%"),
    ("51%", "50%"),
    ("47%", "50%"),
    ("0", "0"),
    ("0.0", "0"),
    ("1e3", "1000"),
    ("1,000", "1000"),
    ("1,000", "1,000"),
    ("1,000", "1,001"),
    ("Yes", "yes"),
    ("No", "yes"),
    ("dark blue", "Dark Blue"),
    ("blue", "dark blue"),
    ("2014", "2013"),
    ("", "5"),
    ("%", "5"),
    ("five", "5"),
    ("3.14159", "3.0"),
    ("12 %", "12"),
    ("0.0001", "0"),
]


def lmms_eval_function(module: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Top-level functions of an lmms_eval source file, without running the file."""
    package = find_spec("lmms_eval")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / module
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in wanted:
        node.decorator_list = []
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), namespace)
    return namespace


def main() -> None:
    from anls_star import anls_score

    lmms_anls = lmms_eval_function("api/metrics.py", ("anls", "levenshtein_distance"))["anls"]
    relaxed = lmms_eval_function("tasks/chartqa/utils.py", ("relaxed_correctness",))["relaxed_correctness"]
    table = {
        "made_with": {name: importlib.metadata.version(name) for name in ("lmms-eval", "anls-star")},
        "anls": [
            {
                "prediction": prediction,
                "answers": answers,
                "lmms_eval": float(lmms_anls(answers, [prediction])["anls"]),
                "anls_star": float(anls_score(tuple(answers), prediction)),
            }
            for prediction, answers in ANLS_PAIRS
        ],
        "relaxed_accuracy": [
            {"prediction": prediction, "answer": answer, "lmms_eval": float(relaxed(prediction, answer))}
            for prediction, answer in RELAXED_PAIRS
        ],
    }
    out = Path(__file__).with_name("metric_references.json")
    out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
