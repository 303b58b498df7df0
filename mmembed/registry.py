"""name -> class of a family, found by scanning the family's own package.

Adding a thing is adding a file: a class registers by living in a module of its family's package, deriving from the
family's base and carrying a `name`. Scanning happens at first use (it imports the family's modules), never at import.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from mmembed.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one family.

    Args:
        package: dotted package whose modules are scanned, for example `mmembed.pooling`.
        base: a class that every member derives from. Members carry a class attribute `name`.
    """

    def __init__(self, package: str, base: type[T]) -> None:
        self.package, self.base = package, base
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

    def build(self, block: str | Mapping[str, Any], **extra: Any) -> T:
        """Builds from `"mean"` or `{"type": "mean", **constructor arguments}`: the constructor is the schema.

        `extra` holds what the caller knows and a user does not write (for example `hidden_size`); a constructor takes
        of it what it names. Raises ConfigError on an unknown name or argument.
        """
        arguments = {"type": block} if isinstance(block, str) else dict(block)
        if "type" not in arguments:
            raise ConfigError(f"{self.package.rsplit('.', 1)[-1]}: the block {arguments} has no 'type'")
        cls = self.get(arguments.pop("type"))
        accepted = inspect.signature(cls).parameters
        for key in arguments:
            if key not in accepted:
                known = set(accepted) - set(extra)
                raise ConfigError(
                    f"{self.package.rsplit('.', 1)[-1]}.{vars(cls)['name']}: unknown option '{key}'; "
                    f"{nearest(key, known) if known else 'it takes no options'}"
                )
        return cls(**arguments, **{key: value for key, value in extra.items() if key in accepted})
