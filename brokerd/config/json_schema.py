"""The JSON Schema of a configuration file, generated from the models.

The docstring below each field of a model is the field's description.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue

from brokerd.config import model

__all__ = ["described", "json_schema"]


class _Schema(GenerateJsonSchema):
    """Draft 2020-12, without null for an absent key: a key in the file has a value."""

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        json_schema = super().default_schema(schema)
        # A section has no default of its own: each of its keys shows its default.
        if json_schema.get("default") is None or isinstance(json_schema["default"], dict):
            del json_schema["default"]
        return json_schema

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        return {"$schema": self.schema_dialect, **super().generate(schema, mode)}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, as in config/brokerd.schema.json."""
    return described(model.File).model_json_schema(schema_generator=_Schema)


def described(wanted: type[BaseModel]) -> type[BaseModel]:
    """Return a model of ``brokerd.config.model`` whose fields have their descriptions."""
    docstrings = dict(_docstrings())
    for name, each in vars(model).items():
        if not (inspect.isclass(each) and issubclass(each, BaseModel) and name in docstrings):
            continue
        for owner in reversed(each.__mro__):
            for field, text in docstrings.get(owner.__name__, {}).items():
                each.model_fields[field].description = text
        each.model_rebuild(force=True)
    return wanted


def _docstrings() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each class of the module, and the docstrings of its fields."""
    for node in ast.parse(inspect.getsource(model)).body:
        if isinstance(node, ast.ClassDef):
            yield (
                node.name,
                {
                    field.target.id: inspect.cleandoc(text.value.value)
                    for field, text in zip(node.body, node.body[1:], strict=False)
                    if isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)
                },
            )
