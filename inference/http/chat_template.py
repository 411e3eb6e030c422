"""The model's chat template: messages become the one text that the model was trained on.

Owns `ChatTemplate`. Invariants: the same text as `transformers.apply_chat_template` for what templates of the Hub use; templates come from
strangers, so they run in jinja2's immutable sandbox and see plain JSON values only.
It must never let a template's failure out as anything but `InvalidArgument`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvfs.common.errors import InvalidArgument, SetupError

TEMPLATE_FILE = "chat_template.jinja"


_NEVER_GIVEN = {"tools": None, "documents": None}
"""As transformers passes them: templates ask whether they are none, not whether they are there."""


class _Generation(jinja2.ext.Extension):  # type: ignore[misc]
    """{% generation %} marks what the assistant said, for training; here it only stands for its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _fail, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise SetupError(f"{where}: the chat template cannot be read: {error}") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def find(cls, directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The file of its own goes before the one in tokenizer_config.json; of several there, the one named default."""
        file = directory / TEMPLATE_FILE
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), special_tokens, str(file))
        source = config.get("chat_template")
        if isinstance(source, list):
            source = next((each.get("template") for each in source if isinstance(each, dict) and each.get("name") == "default"), None)
        return cls(source, special_tokens, f"{directory}/tokenizer_config.json") if isinstance(source, str) else None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None) -> str:
        """`variables`: more of what the template may ask for (`chat_template_kwargs`)."""
        given = {
            **_NEVER_GIVEN,
            **self._special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return str(self._template.render(given))
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgument(f"the model's chat template does not take these messages: {error}") from None
