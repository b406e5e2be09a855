"""HTML whose text is escaped by construction: only what `tag` made is taken as markup."""

from collections.abc import Iterable
from html import escape

VOID = {"meta", "link", "line", "rect", "path"}  # without content


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """An element. Strings in it are escaped, Markup is not; attributes that are None are left out.

    Attributes that are no names in Python are written `class_`, `aria_label`.
    """
    keys = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    start = "".join([f"<{name}", *(f' {key}="{escape(_shown(value))}"' for key, value in keys)])
    return Markup(f"{start}/>" if name in VOID else f"{start}>{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """The parts one behind the other, text escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4f}".rstrip("0").rstrip(".")
