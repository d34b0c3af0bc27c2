"""Real tables out of the files of statsmodels and vega-datasets, as (label, value) rows with whole-number values.

Only what the table and chart generators share; drawing is not done here.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Column:
    """One value column of a real table with its row labels; values are rounded to whole numbers from 0 to 999."""

    table: str
    name: str
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Table:
    file: str
    label: str
    columns: dict[str, str]
    """Column of the file -> short name for the header."""
    delimiter: str = ","


TABLES = {
    "train": (
        _Table(
            "statsmodels/datasets/statecrime/statecrime.csv",
            "state",
            {
                "violent": "Crime",
                "hs_grad": "School",
                "poverty": "Poor",
                "single": "Single",
                "white": "White",
                "urban": "Urban",
            },
        ),
        _Table("statsmodels/datasets/sunspots/sunspots.csv", "YEAR", {"SUNACTIVITY": "Spots"}),
        _Table(
            "statsmodels/datasets/elnino/elnino.csv", "YEAR", {"JAN": "Jan", "APR": "Apr", "JUL": "Jul", "OCT": "Oct"}
        ),
        _Table(
            "statsmodels/datasets/macrodata/macrodata.csv",
            "year",
            {"cpi": "Prices", "pop": "People", "realinv": "Invest"},
        ),
        _Table("statsmodels/datasets/grunfeld/grunfeld.csv", "year", {"invest": "Invest", "capital": "Capital"}),
        _Table("statsmodels/datasets/elec_equip/elec_equip.csv", "DATE", {"STS.M.I7.W.TOVT.NS0016.4.000": "Sales"}),
        _Table("statsmodels/datasets/co2/co2.csv", "date", {"co2": "CO2"}),
        _Table(
            "vega_datasets/_data/cars.json",
            "Name",
            {"Horsepower": "Power", "Miles_per_Gallon": "Miles", "Displacement": "Size"},
        ),
        _Table("vega_datasets/_data/barley.json", "site", {"yield": "Yield"}),
        _Table("vega_datasets/_data/seattle-weather.csv", "date", {"temp_max": "High", "temp_min": "Low"}),
        _Table("vega_datasets/_data/ohlc.json", "date", {"open": "Open", "close": "Close"}),
        _Table("vega_datasets/_data/stocks.csv", "symbol", {"price": "Price"}),
    ),
    "heldout": (
        _Table(
            "statsmodels/datasets/scotland/scotvote.csv",
            "COUNCILDIST",
            {"YES": "Yes", "COUTAX": "Tax", "MOR": "Deaths", "ACT": "Active"},
        ),
        _Table("statsmodels/datasets/cpunish/cpunish.csv", "STATE", {"EXECUTIONS": "Cases", "VC100k96": "Crime"}),
        _Table("statsmodels/datasets/nile/nile.csv", "year", {"volume": "Nile"}),
        _Table("statsmodels/datasets/copper/copper.csv", "YEAR", {"COPPERPRICE": "Copper", "ALUMPRICE": "Alum."}),
        _Table(
            "statsmodels/datasets/china_smoking/china_smoking.csv",
            "Location",
            {"smoking_yes_cancer_yes": "Ill", "smoking_no_cancer_no": "Well"},
        ),
        _Table("vega_datasets/_data/wheat.json", "year", {"wheat": "Wheat"}),
        _Table("vega_datasets/_data/crimea.json", "date", {"wounds": "Wounds", "other": "Other", "disease": "Ill"}),
    ),
}
"""The split is by table: no file is in both."""

MAX_LABEL = 8


def _read(table: _Table) -> list[dict[str, str]]:
    package, _, inside = table.file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the table and chart generators need {package} (pip install 'alignvlm[quickstart]')")
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.is_file():
        raise DataError(f"{package} is installed without {inside}: another version of it is needed")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return [{key: "" if value is None else str(value) for key, value in row.items()} for row in json.loads(text)]
    return list(csv.DictReader(text.splitlines(), delimiter=table.delimiter))


def _label(text: str) -> str:
    """The shortest readable form of a row label: years of dates, no underscores."""
    text = text.strip().replace("_", " ")
    if len(text) >= 8 and text[:8].isdigit():  # 19580329
        return f"{text[:4]}-{text[4:6]}"
    if len(text) >= 10 and text[:4].isdigit():  # 2012/01/31, 1854-04-01
        return text[5:10].replace("/", "-")
    if text.count("-") == 2 and text[-4:].isdigit():  # Jan-1-1995
        return f"{text[:3]} {text[-2:]}"
    return text.removesuffix(".0")


@functools.lru_cache(maxsize=2)
def load_columns(split: str) -> tuple[Column, ...]:
    """Every value column of the split's tables with its usable rows (short label, value 0-999), six at least."""
    columns = []
    for table in TABLES[split]:
        records = _read(table)
        for column, name in table.columns.items():
            rows = []
            for record in records:
                label, raw = _label(record[table.label]), record[column].strip()
                if not raw or raw == "NA" or len(label) > MAX_LABEL:
                    continue
                value = round(float(raw))
                if 0 <= value <= 999:
                    rows.append((label, value))
            if len(rows) >= 6:
                columns.append(Column(table.file, name, tuple(rows)))
    return tuple(columns)
