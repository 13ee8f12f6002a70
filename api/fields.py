"""What a body's type says of its fields: a twin of the type that refuses unknown ones, the options
that may stand in the query too, and one rule for an option that stands in two places.

A type with `forbid_unknown_fields=True` has them refused. Of any other, `api.codec.read_json`
ignores them and says so in the response: so a dialect takes what the server it stands in for takes.
"""

import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

# Inputs of Ollama's routes, which may be absent there; other routes' inputs are required.
_OPTIONAL_INPUTS = ("input", "prompt")
_SCALARS = (str, int, float, bool, types.NoneType)


@functools.cache
def strict(schema: type[T]) -> type[T]:
    """A subclass of `schema` that refuses unknown fields, in nested objects too."""
    if schema.__struct_config__.forbid_unknown_fields:
        return schema
    nested: list[Any] = []
    for field in msgspec.structs.fields(schema):
        if struct_in(field.type):
            parts = (strict(part) if _is_struct(part) else part for part in _parts(field.type))
            default = () if field.required else (field.default,)
            nested.append((field.name, functools.reduce(operator.or_, parts), *default))
    return msgspec.defstruct(  # type: ignore[return-value]  # one of its bases is `schema`
        schema.__name__, nested, bases=(schema,), kw_only=True, forbid_unknown_fields=True
    )


def struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The type of the object that a field of this type may hold."""
    return next(filter(_is_struct, _parts(kind)), None)


def _parts(kind: Any) -> tuple[Any, ...]:
    # `Literal["a"] | None` is a typing.Union.
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if union else (kind,)


def _is_scalar(kind: Any) -> bool:
    return kind in _SCALARS or typing.get_origin(kind) is typing.Literal


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@functools.cache
def field_types(schema: type[msgspec.Struct]) -> dict[str, Any]:
    """The type of each field."""
    return {field.name: field.type for field in msgspec.structs.fields(schema)}


@functools.cache
def options_of(schema: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """A type of those fields of `schema` that can stand in a query: optional ones of one value that
    are no inputs.
    """
    fields = [
        (field.name, field.type, None)
        for field in msgspec.structs.fields(schema)
        if not field.required
        and field.name not in _OPTIONAL_INPUTS
        and all(map(_is_scalar, _parts(field.type)))
    ]
    return msgspec.defstruct("Options", fields, forbid_unknown_fields=True)


def read_options(
    pairs: Iterable[tuple[str, str]], schema: type[msgspec.Struct]
) -> tuple[dict[str, object], list[str]]:
    """Options that came as text, in a query or a form, checked as those of a JSON body are.

    Returns: the options that are given, and the names of unknown ones where `schema` ignores them.
    Raises: msgspec.ValidationError for a wrong value, an option that is given twice, an input, and
    an unknown one where `schema` refuses it.
    """
    options = options_of(schema)
    known, unknown = options.__struct_fields__, []
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in given:
            raise msgspec.ValidationError(f"field `{name}` is given twice")
        if name in known or schema.__struct_config__.forbid_unknown_fields:
            given[name] = value
        elif name in schema.__struct_fields__:
            raise msgspec.ValidationError(f"field `{name}` goes in the body")
        else:
            unknown.append(name)
    made = msgspec.convert(given, options, strict=False)
    return {name: value for name in given if (value := getattr(made, name)) is not None}, unknown


def fill(body: msgspec.Struct, given: Mapping[str, object], where: str) -> None:
    """Set options of `body` that were given elsewhere.

    Args:
        where: stands before their names, for errors, such as "$.parameters.".

    Raises: msgspec.ValidationError for one that `body` has with another value.
    """
    for name, value in given.items():
        there = getattr(body, name)
        if there is None:
            setattr(body, name, value)
        elif there != value:
            raise msgspec.ValidationError(f"$.{name} and {where}{name} differ; send one of them")
