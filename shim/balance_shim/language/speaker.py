"""Which language a user reads, and texts in it."""

from collections.abc import Callable, Mapping
from typing import Any, TextIO

from ..choices import Language
from .message import Joined, Message

Say = Callable[[str], str]
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")  # in the order of POSIX: the first that is not empty counts


def language_of(environ: Mapping[str, str], chosen: Language | None = None) -> Language:
    """Return `chosen`, a valid `BALANCE_LANG`, else the language of the locale: Chinese for `zh_*`, else English."""
    if chosen is not None:
        return chosen
    locale = next((environ[name] for name in LOCALE if environ.get(name)), "")
    return "zh" if locale.lower().partition("_")[0].partition(".")[0] == "zh" else "en"


def english(text: str) -> str:
    """Return `text` as it is: a `Say`."""
    return text


def speaker(language: Language, stream: TextIO | None, more: Mapping[str, str] | None = None) -> Say:
    """Return a function that translates texts; English where `stream` cannot show the other language's characters.

    Args:
        more: translations of whole texts besides those of the catalogue.
    """
    if language == "en":
        return english
    from .chinese import MESSAGES

    catalogue = {**MESSAGES, **(more or {})}
    try:
        "".join(catalogue.values()).encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return english
    return lambda text: translate(text, catalogue)


def translate(text: Any, catalogue: Mapping[str, str]) -> Any:
    """Return `text` with what `catalogue` has in place of its template and of the texts in its fields."""
    if isinstance(text, Joined):
        return catalogue.get(text.separator, text.separator).join(translate(part, catalogue) for part in text.parts)
    if isinstance(text, Message):
        fields = {name: translate(value, catalogue) for name, value in text.fields.items()}
        template = catalogue.get(text.template, text.template)
        return template.format(**fields) if fields else template
    return catalogue.get(text, text) if isinstance(text, str) else text
