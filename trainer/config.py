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

NO_RUN = ("base/", "sweeps/")
"""Folders under `configs/` whose files are no configuration of a run: parts of others, and sweeps over them."""

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

        Another `kind` drops what lower layers (files, as against arguments) have set beside it: the keys of the other
        class mean nothing.
        """
        self._set(dotted.split("."), value, origin)

    def _set(self, parts: list[str], value: Any, origin: str) -> None:
        *parents, last = parts
        dotted = ".".join(parts)
        node = self.values
        for i, part in enumerate(parents):
            if not isinstance(node.get(part), dict):
                node[part] = {}
                self.origins[".".join(parents[: i + 1])] = origin
            node = node[part]
        if isinstance(value, Mapping):
            if not isinstance(node.get(last), dict):
                node[last] = {}
                self.origins[dotted] = origin
            for name in sorted(value, key=lambda name: name != "kind"):  # the kind first: it drops what was there
                self._set([*parts, str(name)], value[name], origin)  # a dot in a name is part of it
            return
        if last == "kind" and node.get(last) not in (None, value):
            parent = ".".join(parents)
            for name in [n for n in node if self.origin(f"{parent}.{n}") != origin]:
                self._drop(node, name, f"{parent}.{name}")
        node[last] = value
        self.origins[dotted] = origin

    def _drop(self, node: dict[str, Any], name: str, dotted: str) -> None:
        del node[name]
        for key in [k for k in self.origins if k == dotted or k.startswith(f"{dotted}.")]:
            del self.origins[key]

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
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: a key must be text")
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor, which the base class sees to
                continue
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: key {name!r} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: a date such as 2024-13-01


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def find_file(name: str) -> Path:
    """Path of a config named on the command line: `speech/tones`, or any path to a YAML file.

    Raises:
        UserError: no such file; the message names the nearest one.
    """
    configs = PROJECT / "configs"
    for candidate in (Path(name), configs / name, configs / f"{name}.yaml"):
        if is_file(candidate):
            return candidate
    known = sorted(str(p.relative_to(configs).with_suffix("")) for p in configs.rglob("*.yaml"))
    known = [name for name in known if not name.startswith(NO_RUN)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "known configs: " + ", ".join(known)
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    raise UserError(f"{shown}: there is no such config, neither a file nor under {configs}; {hint}")


def read_yaml(path: Path, _including: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A YAML file and what it includes, as (file, mapping), the included first."""
    path = path.resolve()
    if path in _including:
        raise UserError(f"{show(path)}: include: the file includes itself by way of {show(_including[-1])}; drop one")
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be read: {error.strerror}; name another file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{show(path)}: is not UTF-8 text: {error}") from error
    except NOT_YAML as error:
        raise UserError(f"{show(path)}: is not YAML: {error}") from error
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
        raise UserError(f"{show(path)}: holds {type(mapping).__name__}, wanted `key: value` lines with text keys")
    includes = mapping.pop("include", [])
    names = [includes] if isinstance(includes, str) else includes
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        cure = "wanted a file beside this one, or a list of them; name it or remove the key"
        raise UserError(f"{show(path)}: include = {includes!r}: {cure}")
    files: list[tuple[Path, dict[str, Any]]] = []
    for name in names:
        included = path.parent / name
        if not is_file(included):
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
        if not equals or not all(name.split(".")) or name.startswith("-"):
            raise UserError(f"{text}: is not an override; write key=value, e.g. optimizer.lr=1e-3")
        try:
            value = yaml.load(literal, _Loader)
        except NOT_YAML:
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
        return f"{where}: {_unknown(model, source, dotted)}"
    if kind == "missing":
        return f"{where}: is missing; add it"
    if kind in ("union_tag_invalid", "union_tag_not_found", "model_attributes_type"):
        kinds = [_kind(member) for member in _members(model, dotted)]
        if not isinstance(value, Mapping):
            cure = f"wanted a mapping, as {{kind: {kinds[0]}}}; known kinds: {', '.join(kinds)}"
            return f"{where} = {value!r}: {cure}"
        if kind == "union_tag_not_found":
            return f"{where}: needs a `kind`: one of {', '.join(kinds)}"
        where = f"{source.origin(f'{dotted}.kind')}: {dotted}.kind"
        return f"{where} = {context['tag']!r}: unknown kind; {_nearest(str(context['tag']), kinds, [])}"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(value, Mapping) and kind == "value_error":
        return f"{where}: {message}"
    return f"{where} = {value!r}: {message[0].lower()}{message[1:]}"


def _unknown(model: type[Config], source: Source, dotted: str) -> str:
    """Why a key is unknown: it belongs to another kind, or is misspelt."""
    parent, _, last = dotted.rpartition(".")
    members = _members(model, parent)
    node: Any = source.values
    for part in parent.split(".") if parent else []:
        node = node[int(part)] if isinstance(node, Sequence) else node[part]
    chosen = [m for m in members if _kind(m) == node.get("kind")] or members
    owners = [_kind(m) for m in members if last in m.model_fields]
    if owners:
        kinds = " and ".join(owners)
        return f"unknown key of kind {node.get('kind')}: it belongs to {kinds}; remove it or set {parent}.kind"
    prefix = f"{parent}." if parent else ""
    siblings = [f"{prefix}{name}" for member in chosen for name in member.model_fields]
    return f"unknown key; {_nearest(dotted, siblings, list(keys_of(model)))}"


def _members(model: type[Config], dotted: str) -> list[type[Config]]:
    """The classes that the field of a dotted key may hold; `model` itself for the empty key."""
    members = [model]
    for part in dotted.split(".") if dotted else []:
        if not part.isdigit():  # else a place in a list
            fields = [m.model_fields[part] for m in members if part in m.model_fields]
            members = [m for field in fields for m in _models_in(field.annotation)]
    return members


def _kind(model: type[Config]) -> str:
    field = model.model_fields.get("kind")
    return str(field.default) if field else ""


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


def _nearest(name: str, siblings: list[str], elsewhere: list[str]) -> str:
    """A hint: the nearest of the names that could stand there, else of those at other places, else all siblings."""
    last = name.rpartition(".")[2]
    by_last = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    if near := difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6):
        return f"did you mean {by_last[near[0]]}?"
    others = [key for key in elsewhere if not name.startswith(f"{key}.")]
    found = [key for key in others if key.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else "known here: " + ", ".join(sorted(by_last))


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


def load_yaml(path: Path) -> dict[str, Any]:
    """What `dump_yaml` wrote into the configuration of a run.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, *NOT_YAML) as error:
        raise UserError(
            f"{show(path)}: is not YAML that can be read: {error}\nput it back (state.json of each checkpoint holds "
            "the configuration), or start another run with name=OTHER"
        ) from error
    return values if isinstance(values, dict) else {}
