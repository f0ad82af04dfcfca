"""Descriptions of settings and hyperparameters: the docstrings beneath their fields.

Read where they are shown. Pydantic's `use_attribute_docstrings` reads them whenever a class is defined, which costs
every command half a second.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from textwrap import dedent

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema


def description(model: type[BaseModel], name: str) -> str:
    """Field(description=...), or the docstring beneath the field; a subclass that changes a default inherits it."""
    fields = (c.model_fields.get(name) for c in model.__mro__ if issubclass(c, BaseModel))
    given = next((field.description for field in fields if field and field.description), None)
    docstrings = (_attribute_docstrings(c).get(name) for c in model.__mro__ if name in inspect.get_annotations(c))
    return given or next(filter(None, docstrings), "")


@cache
def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Name → docstring beneath it, for the annotations in a class's own body; none where its source is not at hand."""
    try:
        (definition,) = ast.parse(dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):  # a plug-in may make its class with a function, or without a file
        return {}
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docstrings[name] = inspect.cleandoc(text)
    return docstrings


class DescribedJsonSchema(GenerateJsonSchema):
    """JSON Schema with the descriptions of all fields."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        json_schema = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        for name, field in model.model_fields.items():
            described = json_schema.get("properties", {}).get(field.alias if self.by_alias and field.alias else name)
            if described is not None and (text := description(model, name)):
                described.setdefault("description", text)
        return json_schema
