"""What is begun before it is asked for."""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Foresight(Generic[T]):
    """Begins what is asked for next where the same names are asked for in the same order again and again, as a model's
    forwards do, also across the end of one.

    begin: begins a name's, or gives None where there is no room for it yet.
    forget: is told what was begun in vain.
    """

    def __init__(self, begin: Callable[[str], T | None], forget: Callable[[T], None]):
        self._begin, self._forget = begin, forget
        self._ahead: dict[str, T] = {}  # in the order in which it will be asked for
        self._follower: dict[str, str] = {}  # what was asked for after each the last time
        self._last: str | None = None

    @property
    def ahead(self) -> Mapping[str, T]:
        """What is begun and not taken yet, in the order in which it will be asked for."""
        return self._ahead

    def take(self, name: str) -> T | None:
        """What was begun as `name`, if it was. What was foreseen before it is forgotten."""
        foreseen = list(self._ahead)
        self._forget_names(foreseen[: foreseen.index(name)] if name in self._ahead else foreseen)
        if self._last is not None:
            self._follower[self._last] = name
        self._last = name
        return self._ahead.pop(name, None)

    def go_on(self) -> None:
        """Begin what comes next, as far as there is room."""
        name = next(reversed(self._ahead), self._last)
        while name is not None and (name := self._follower.get(name)) is not None and name not in self._ahead:
            if (begun := self._begin(name)) is None:
                return
            self._ahead[name] = begun

    def forget_all(self) -> None:
        """Forget what is foreseen; the order is known still."""
        self._forget_names(list(self._ahead))

    def _forget_names(self, names: list[str]) -> None:
        for name in names:
            self._forget(self._ahead.pop(name))
