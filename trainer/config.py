"""Configuration: pydantic models with defaults, YAML that holds what differs, `key.sub=value` on top of that.

A config class stands beside the class it builds. A key that nobody declared is an error that names the nearest one,
and all errors are printed at once. This is the only module that reads YAML.
"""

import contextlib
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from trainer.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
"""The folder that holds `configs/` and `recipes/`."""

T = TypeVar("T")
Free = Annotated[T, Field(json_schema_extra={"on_resume": "may change"})]
"""Type of a key that may differ when a run is resumed; every other key is part of what the run is."""


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, the string under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class Source:
    """A merged configuration and, for each dotted key, the file or argument that set it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def set(self, dotted: str, value: Any, origin: str) -> None:
        """Set one key; a mapping is merged into what is there, anything else replaces it.

        A mapping that names another `kind` replaces the old one as a whole: the keys of the other class mean nothing.
        """
        *parents, last = dotted.split(".")
        node = self.values
        for i, part in enumerate(parents):
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                child = node[part] = {}
                self.origins[".".join(parents[: i + 1])] = origin
            node = child
        if isinstance(value, Mapping):
            old = node.get(last)
            if not isinstance(old, dict) or ("kind" in value and old.get("kind") not in (None, value["kind"])):
                node[last] = {}
            self.origins.setdefault(dotted, origin)
            for name, item in value.items():
                self.set(f"{dotted}.{name}", item, origin)
        else:
            node[last] = value
            self.origins[dotted] = origin

    def origin(self, dotted: str) -> str:
        """Where a key, or else the mapping around it, came from."""
        parts = dotted.split(".")
        for end in range(len(parts), 0, -1):
            if (found := self.origins.get(".".join(parts[:end]))) is not None:
                return found
        return "the configuration"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently take from its last place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: key {name!r} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def find_file(name: str) -> Path:
    """Path of a config named on the command line: `speech/tones`, or any path to a YAML file.

    Raises:
        UserError: no such file; the message names the nearest one.
    """
    configs = PROJECT / "configs"
    for candidate in (Path(name), configs / name, configs / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(configs).with_suffix("")) for p in configs.rglob("*.yaml"))
    known = [name for name in known if not name.startswith("base/")]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "known configs: " + ", ".join(known)
    raise UserError(f"{name}: there is no such config, neither a file nor under {configs}; {hint}")


def read_yaml(path: Path, _including: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A YAML file and what it includes, as (file, mapping), the included first."""
    path = path.resolve()
    if path in _including:
        raise UserError(f"{show(path)}: include: the file includes itself by way of {show(_including[-1])}; drop one")
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{show(path)}: is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{show(path)}: is not YAML: {error}") from error
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
        raise UserError(f"{show(path)}: holds {type(mapping).__name__}, wanted `key: value` lines with text keys")
    includes = mapping.pop("include", [])
    files: list[tuple[Path, dict[str, Any]]] = []
    for name in [includes] if isinstance(includes, str) else includes:
        included = path.parent / name
        if not included.is_file():
            raise UserError(f"{show(path)}: include: {name}: there is no such file beside it ({show(included)})")
        files += read_yaml(included, (*_including, path))
    return [*files, (path, mapping)]


def show(path: Path) -> str:
    """A path as a message shows it: relative to where the user stands, if it is below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def gather(path: Path, overrides: Sequence[str]) -> Source:
    """Merge a file, its includes and the `key=value` arguments."""
    source = Source()
    for file, mapping in read_yaml(path):
        for name, value in mapping.items():
            source.set(name, value, show(file))
    override(source, overrides)
    return source


def override(source: Source, arguments: Sequence[str]) -> None:
    """Put `key=value` arguments on top.

    Raises:
        UserError: an argument is not of that form.
    """
    for text in arguments:
        name, equals, literal = text.partition("=")
        if not equals or not name or name.startswith("-"):
            raise UserError(f"{text}: is not an override; write key=value, e.g. optimizer.lr=1e-3")
        try:
            value = yaml.load(literal, _Loader)
        except yaml.YAMLError:
            value = literal  # a text with a colon or a bracket in it, such as a path
        source.set(name, value, "the command line")


ConfigT = TypeVar("ConfigT", bound=Config)


def validate(model: type[ConfigT], source: Source) -> ConfigT:
    """Build a config from merged values.

    Raises:
        UserError: every error at once, a line each, with file, key, value and cure.
    """
    try:
        return model.model_validate(source.values)
    except ValidationError as error:
        lines = [_explain(model, source, detail) for detail in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from error


def _explain(model: type[Config], source: Source, detail: ErrorDetails) -> str:
    dotted = _dotted(detail["loc"], source.values)
    where = f"{source.origin(dotted)}: {dotted or 'the configuration'}"
    value, kind = detail["input"], detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {_nearest(dotted, list(keys_of(model)))}"
    if kind == "missing":
        return f"{where}: is missing; add it"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        if not isinstance(value, Mapping):
            return f"{where} = {value!r}: wanted a mapping with a `kind:`"
        if kind == "union_tag_not_found":
            return f"{where}: needs a `kind`"
        expected = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return f"{where}.kind = {context['tag']!r}: unknown kind; {_nearest(str(context['tag']), expected)}"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(value, Mapping) and kind == "value_error":
        return f"{where}: {message}"
    return f"{where} = {value!r}: {message[0].lower()}{message[1:]}"


def _dotted(location: Sequence[int | str], values: Any) -> str:
    """Dotted key of an error; pydantic puts the tag of a union into the location, which is not a key."""
    parts: list[str] = []
    node: Any = values
    for i, part in enumerate(location):
        if isinstance(node, Mapping) and part not in node and part == node.get("kind"):
            continue
        if isinstance(part, str) and not isinstance(node, (Mapping, Sequence)) and i < len(location) - 1:
            continue  # name of a member of a plain union
        parts.append(str(part))
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            node = None
    return ".".join(parts)


def _nearest(name: str, known: list[str]) -> str:
    parent = name.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.6)
    if near:
        return f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == last]
    if not elsewhere:
        elsewhere = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return "known here: " + ", ".join(sorted(k.rpartition(".")[2] for k in siblings) or known)


def _models_in(annotation: Any) -> Iterator[type[Config]]:
    """The config classes a field may hold, through Annotated, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    elif typing.get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple):
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


def keys_of(model: type[Config], prefix: str = "") -> dict[str, bool]:
    """Every dotted key of a config class, and whether it may change on resume."""
    keys: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        free = isinstance(extra, dict) and extra.get("on_resume") == "may change"
        keys[prefix + name] = free
        for child in _models_in(field.annotation):
            keys |= {k: free or f for k, f in keys_of(child, f"{prefix}{name}.").items()}
    return keys


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {dotted key: value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def plain(config: Config) -> dict[str, Any]:
    """A config as plain JSON values."""
    return config.model_dump(mode="json")


def differences(saved: Mapping[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """Keys that make it another run: (dotted key, saved value, new value), free keys left out.

    A key that did not exist when the other was saved has its default there: it must mean what was done before.
    """
    with contextlib.suppress(ValidationError):  # it holds what is no key or value any more: that is a difference
        saved = plain(type(config).model_validate(saved))
    old, new = flatten(saved), flatten(plain(config))
    free = [name for name, may_change in keys_of(type(config)).items() if may_change]
    absent = "(absent)"
    return [
        (name, old.get(name, absent), new.get(name, absent))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
        and not any(name == k or name.startswith(f"{k}.") for k in free)
    ]


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def load_yaml(text: str) -> dict[str, Any]:
    """The inverse of `dump_yaml`."""
    values = yaml.load(text, _Loader)
    return values if isinstance(values, dict) else {}
