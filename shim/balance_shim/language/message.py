"""A text that remembers how it was made, so that it can be shown in another language.

To the program a `Message` is the English `str`: files, JSON and comparisons do not change.
"""

from collections.abc import Iterable
from typing import Any


class Message(str):
    """The English text of `template` with its `fields`; `translate` shows it in another language.

    Attributes:
        template: the key of the catalogue, with fields as in `str.format`.
        fields: name -> value; one that is a `Message` or `Joined` is translated, too.
    """

    __slots__ = ("fields", "template")

    template: str
    fields: dict[str, Any]

    def __new__(cls, template: str, /, **fields: Any) -> "Message":
        self = super().__new__(cls, template.format(**fields) if fields else template)
        self.template, self.fields = template, fields
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (self.template,), self.fields


class Joined(str):
    """Texts with a separator between them, each of which is translated by itself."""

    __slots__ = ("parts", "separator")

    separator: str
    parts: tuple[str, ...]

    def __new__(cls, separator: str, parts: Iterable[str]) -> "Joined":
        parts = tuple(parts)
        self = super().__new__(cls, separator.join(parts))
        self.separator, self.parts = separator, parts
        return self

    def __getnewargs__(self) -> tuple[str, tuple[str, ...]]:  # type: ignore[override]
        return self.separator, self.parts
