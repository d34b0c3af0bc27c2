"""Dataclasses that recipes are read into: their types are checked strictly, and every field documents itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Strict

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass that pydantic validates without unknown keys, documented by the strings below its fields."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


def filled(default: Any = None) -> Any:
    """A field that the program fills in: recipes may not state it, and it is not written back to them."""
    return field(default=default, metadata={FILLED: True})


FILLED = "filled"


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


MOST = 2**31 - 1
"""No count of a recipe is larger: what it counts would fit no machine."""

# `1` is no boolean, `true` no number and `"5"` neither, but `1e3` is a whole number. No number is infinite or NaN.
Int = Annotated[int, Strict(), BeforeValidator(_whole)]
Float = Annotated[float, Strict(), AllowInfNan(False)]
Bool = Annotated[bool, Strict()]
PositiveInt = Annotated[int, Strict(), Ge(1), Le(MOST), BeforeValidator(_whole)]
Count = Annotated[int, Strict(), Ge(0), Le(MOST), BeforeValidator(_whole)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Ge(0), Le(1)]
