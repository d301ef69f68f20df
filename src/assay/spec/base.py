"""What every spec is: frozen data that refuses what it does not know, and says why plainly."""

from collections.abc import Mapping
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from assay.errors import AssayError, did_you_mean


class _PlainErrors(type(BaseModel)):
    """Construction by a caller (not pydantic's own, of nested parts) raises AssayError."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise AssayError(_sentence(error, cls)) from None


class Spec(BaseModel, metaclass=_PlainErrors):
    """Frozen, hashable, JSON both ways; unknown fields are refused with the nearest right name.

    Raises:
        AssayError: on construction, if a field is unknown, missing, or out of its range.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The spec that `to_json` wrote."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise AssayError(_sentence(error, cls)) from None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The spec of a plain nested dict, as `model_dump` gives it."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise AssayError(_sentence(error, cls)) from None

    def to_json(self, indent: int | None = 2) -> str:
        return self.model_dump_json(indent=indent)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated as if it were new."""
        return type(self)(
            **{name: getattr(self, name) for name in type(self).model_fields} | changes
        )

    def at(self, path: str, value: Any) -> Self:
        """A copy with the field at a dotted path changed, as in `decoder.num_layers`."""
        return self.changed({path: value})

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A copy with the fields at some dotted paths changed, validated once, after all of them.

        `*` stands for every entry of a list: `decoder.pattern.*.attention.heads`. Another `kind`
        of a variant starts from its own defaults; its name alone may stand for it
        (`optimizer=muon`).

        Raises:
            AssayError: if a path does not exist (the nearest right ones are named), or if a
                value is not legal there.
        """
        data = self.model_dump(mode="json")
        for path, value in changes.items():
            _assign(data, path.split("."), value, path)
        return type(self).from_data(data)


def _assign(data: Any, parts: list[str], value: Any, path: str) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(data, list):
        if head != "*" and not (head.isdigit() and int(head) < len(data)):
            legal = [*map(str, range(len(data))), "*"]
            raise AssayError(f"{path}: '{head}' is not in the list; {did_you_mean(head, legal)}")
        for i in range(len(data)) if head == "*" else [int(head)]:
            if rest:
                _assign(data[i], rest, value, path)
            else:
                data[i] = value
        return
    if not isinstance(data, dict):
        where = path.removesuffix("." + ".".join(parts))
        raise AssayError(f"{path}: {where} is {data!r} and has no fields; set it as a whole.")
    fresh = [*data] == ["kind"]  # a variant just switched to: its fields are checked later
    if head not in data and not fresh:
        near = [p for p in _paths(data) if p.split(".")[-1] == parts[-1]]
        also = f" ('{parts[-1]}' is at {', '.join(near[:3])} below it.)" if near else ""
        raise AssayError(f"{path}: there is no field '{head}'; {did_you_mean(head, data)}{also}")
    if rest:
        _assign(data[head], rest, value, path)
    elif head == "kind" and data["kind"] != value:
        data.clear()
        data["kind"] = value
    elif isinstance(value, str) and isinstance(data.get(head), dict) and "kind" in data[head]:
        data[head] = {"kind": value}
    else:
        data[head] = value


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, of a, of b) wherever two specs, or nested values of plain data, differ."""
    if isinstance(a, BaseModel) and isinstance(b, BaseModel):
        a, b = (spec.model_dump(mode="json") for spec in (a, b))
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [(path, a, b)]
    names = dict.fromkeys([*a, *b])
    parts = (differences(a.get(n), b.get(n), f"{path}.{n}".lstrip(".")) for n in names)
    return [difference for part in parts for difference in part]


def _paths(data: Any, prefix: str = "") -> list[str]:
    """Every dotted path of nested plain data."""
    entries = data.items() if isinstance(data, dict) else []
    if isinstance(data, list):
        entries = enumerate(data)
    paths = []
    for name, value in entries:
        paths += [f"{prefix}{name}", *_paths(value, f"{prefix}{name}.")]
    return paths


def _sentence(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first complaint of a ValidationError, as a sentence."""
    complaints = error.errors()
    first = complaints[0]
    if first["type"] == "missing":  # perhaps it is there, misspelt
        first = next((one for one in complaints if one["type"] == "extra_forbidden"), first)
    path, owner = _walk(cls, first["loc"], first["type"])
    field = path or cls.__name__
    found = first["input"]
    match first["type"]:
        case "extra_forbidden":
            name = str(first["loc"][-1])
            return f"{field}: there is no such field; {did_you_mean(name, owner.model_fields)}"
        case "missing":
            return f"{field}: this field is required."
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in first["ctx"]["expected_tags"].split(",")]
            tag = first["ctx"]["tag"]
            return f"{field}.kind: found '{tag}'; {did_you_mean(tag, tags)}"
        case "union_tag_not_found" if isinstance(found, dict):
            return f"{field}.kind: this field is required."
        case "literal_error":
            legal = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            return f"{field}: found {found!r}; {did_you_mean(str(found), legal)}"
        case "value_error" | "assertion_error":
            message = str(first["ctx"]["error"])
            names_a_field = message.split(":")[0].split(".")[0] in owner.model_fields
            return f"{path}{'.' if names_a_field else ': '}{message}" if path else message
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{field}: found {found!r}, but {message}."


def _walk(
    cls: type[BaseModel], loc: tuple[str | int, ...], kind: str
) -> tuple[str, type[BaseModel]]:
    """The dotted path of a pydantic location, and the class that holds its last field.

    Pydantic puts the names of union members into a location; a user knows fields and indices.
    """
    owners, path = [cls], []
    for i, part in enumerate(loc):
        if isinstance(part, int):
            path.append(str(part))
            continue
        tagged = [c for c in owners if "kind" in c.model_fields and _default_kind(c) == part]
        if tagged:
            owners = tagged
            continue
        unknown = i == len(loc) - 1 and kind == "extra_forbidden"
        if not unknown and not any(part in owner.model_fields for owner in owners):
            continue
        path.append(part)
        inner = [
            member
            for owner in owners
            if part in owner.model_fields
            for member in _models_in(owner.model_fields[part].annotation)
        ]
        if inner and (i < len(loc) - 1 or kind == "value_error"):
            owners = inner
    return ".".join(path), owners[0]


def _default_kind(cls: type[BaseModel]) -> Any:
    return cls.model_fields["kind"].default


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [member for argument in get_args(annotation) for member in _models_in(argument)]
