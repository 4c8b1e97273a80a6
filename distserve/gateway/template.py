"""Chat templates, rendered as transformers renders them.

Owns the Jinja environment (sandboxed: a template comes with the model, and messages come from strangers). Source:
``transformers.utils.chat_template_utils``, whose semantics (trimmed blocks, ``raise_exception``, ``tojson``,
``strftime_now``, loop controls, ``generation`` blocks) templates on the Hub rely on. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateRefused(ValueError):
    """The template would not take these messages; the message is the template's own word."""


class ChatTemplate:
    """One compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: what the template may refer to, such as ``bos_token``.

        Raises ``ValueError`` when the template has a syntax error.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is broken in line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. ``variables`` are further names the template may read."""
        names = self._special_tokens | {"tools": None, "documents": None} | dict(variables or {})
        names |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**names)
        except RecursionError as error:
            raise TemplateRefused("a value has too many lists or objects within each other") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks what the assistant said; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which templates do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
