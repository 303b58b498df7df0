"""name -> class of a family, found by scanning the family's own package.

Adding a thing is adding a file: a class registers by living in a module of its family's package, deriving from the
family's base and carrying a `name`. Scanning happens at first use (it imports the family's modules), never at import.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mmembed.errors import ConfigError, nearest

T = TypeVar("T")
Positive = Annotated[int, Field(gt=0)]  # for the annotations of constructors, which are checked by `build`
Count = Annotated[int, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Registry(Generic[T]):
    """The classes of one family.

    Args:
        package: dotted package whose modules are scanned, for example `mmembed.pooling`.
        base: a class that every member derives from. Members carry a class attribute `name`.
        given: constructor arguments that the callers of `build` know; a user's block must not hold them.
    """

    def __init__(self, package: str, base: type[T], given: Collection[str] = ()) -> None:
        self.package, self.base, self.given = package, base, given
        self._classes: dict[str, type[T]] | None = None

    def classes(self) -> dict[str, type[T]]:
        """All members by name, sorted."""
        if self._classes is None:
            root = importlib.import_module(self.package)
            found: dict[str, type[T]] = {}
            for module_info in pkgutil.iter_modules(root.__path__):
                module = importlib.import_module(f"{self.package}.{module_info.name}")
                for member in vars(module).values():
                    if inspect.isclass(member) and issubclass(member, self.base) and "name" in vars(member):
                        found[vars(member)["name"]] = member
            self._classes = dict(sorted(found.items()))
        return self._classes

    def get(self, name: str) -> type[T]:
        """The class called `name`. Raises ConfigError naming the nearest known name."""
        classes = self.classes()
        if name not in classes:
            family = self.package.rsplit(".", 1)[-1]
            raise ConfigError(f"{family}: there is no '{name}'; {nearest(name, classes)}")
        return classes[name]

    def check(self, block: str | Mapping[str, Any]) -> tuple[type[T], dict[str, Any]]:
        """The class that a block names, and its options: names, types and ranges are right. Builds nothing.

        Raises:
            ConfigError: an unknown name or option, or a value that the constructor's annotation excludes.
        """
        arguments = {"type": block} if isinstance(block, str) else dict(block)
        family = self.package.rsplit(".", 1)[-1]
        if not isinstance(arguments.get("type"), str):
            raise ConfigError(f"{family}: the block {arguments} has no 'type'; write the name, or {{type: name, ...}}")
        cls = self.get(arguments.pop("type"))
        return cls, check_options(cls, arguments, f"{family}.{vars(cls)['name']}", self.given)

    def build(self, block: str | Mapping[str, Any], **extra: Any) -> T:
        """Builds from `"mean"` or `{"type": "mean", **constructor arguments}`: the constructor is the schema.

        `extra` holds what the caller knows and a user does not write (for example `hidden_size`); a constructor takes
        of it what it names. Raises ConfigError as `check` does, and for an option that is missing.
        """
        cls, arguments = self.check(block)
        accepted = inspect.signature(cls).parameters
        arguments |= {key: value for key, value in extra.items() if key in accepted}
        for one in accepted.values():
            if one.default is one.empty and one.kind in _NAMED and one.name not in arguments:
                family = self.package.rsplit(".", 1)[-1]
                raise ConfigError(f"{family}.{vars(cls)['name']}: the option '{one.name}' is missing; give it")
        return cls(**arguments)


def check_options(cls: type, options: Mapping[str, Any], where: str, given: Collection[str] = ()) -> dict[str, Any]:
    """The options of a constructor as its annotations read them: YAML's 1 is a float where one is asked for.

    Types are taken by the word: "false" is no boolean, "4" and true are no numbers, nan and inf neither.

    Args:
        where: opens the messages.
        given: arguments that are not a user's.

    Raises:
        ConfigError: an unknown option (the nearest one named), or a value of another type or range.
    """
    parameters = inspect.signature(cls).parameters.values()
    known = {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)} - set(given)
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]  # of this very class
    checked = {}
    for key, value in options.items():
        if key not in known:
            hint = nearest(key, known) if known else "it takes no options"
            raise ConfigError(f"{where}: unknown option '{key}'; {hint}")
        annotation = hints.get(key, Any)
        try:
            checked[key] = _validated(annotation, value)
        except ValidationError as error:
            raise ConfigError(f"{where}.{key}: {_explain(error, annotation, value)}") from None
    return checked


def _validated(annotation: Any, value: Any) -> Any:
    """YAML has lists alone: one stands for a tuple where that is what is asked for."""
    adapter = TypeAdapter(annotation, config=_STRICT)
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if not isinstance(value, list):
            raise
        with suppress(ValidationError):
            return adapter.validate_python(tuple(value))
        raise


def _explain(error: ValidationError, annotation: Any, value: Any) -> str:
    """What was found, and what the annotation allows."""
    if get_origin(annotation) is Literal and isinstance(value, str):
        return f"there is no '{value}'; {nearest(value, get_args(annotation))}"
    found = error.errors()
    inner = next((item for item in found if item["loc"] and item["input"] is not value), None)  # inside a list
    messages = dict.fromkeys(item["msg"] for item in ([inner] if inner else found))
    at = f" at {value!r}" if inner else ""
    wanted = " or ".join(message[0].lower() + message[1:] for message in messages)
    return f"found {(inner['input'] if inner else value)!r}{at}; {wanted}"
