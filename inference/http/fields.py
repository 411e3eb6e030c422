"""A request's JSON fields, read with their types and limits.

Owns `Fields`. Invariants: null is the same as absent, as OpenAI's clients send it; a value of another type or outside its limits is refused with the
field's name as `param`; a truth value is never a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvfs.inference.http.refusals import Refusal, bad_parameter


class Fields:
    def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
        self._values = values
        self._within = within
        """Name of the field that these are inside of, with a dot."""

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        try:
            text = body.decode()
            values = json.loads(text)
            if "\\u" in text:  # half of a surrogate pair is no text, and no tokenizer takes it
                json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the request's body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(values, dict):
            raise Refusal(400, "the request's body is no JSON object", code="invalid_json")
        return cls(values)

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def refuse(self, name: str, wanted: str) -> Refusal:
        shown = json.dumps(self.get(name), ensure_ascii=False)
        return bad_parameter(self._within + name, f"{self._within}{name} is {shown if len(shown) < 80 else shown[:77] + '...'}: {wanted}")

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float, *, above_low: bool = False) -> float:
        value = self.get(name)
        if value is None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # which NaN is not
        if not fits or (above_low and value == low):
            raise self.refuse(name, f"a number {'above' if above_low else 'from'} {low:g}, up to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, longest: int) -> str | None:
        value = self.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > longest):
            raise self.refuse(name, f"a string of up to {longest} characters")
        return value

    def inside(self, name: str) -> Fields:
        """The fields of an object in a field; none where it is absent."""
        value = self.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return Fields(value, f"{self._within}{name}.")
