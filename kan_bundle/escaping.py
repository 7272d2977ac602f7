"""The one function that everything passes that is printed: to a terminal, a log or a page.

Names of classes, tensors, files and models, and what a server answers, are other people's. Written
raw they could move a cursor, retitle or clear a terminal, reverse a line, or begin a line of their
own. This module imports nothing of others, so that the client has it as well.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

_ACTIVE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: what a terminal obeys
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # what reorders a line
    "\u2028\u2029"  # what begins one
    "\u00ad\u200b\u2060-\u2065\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff"  # what is not seen
    "\ud800-\udfff"  # what no encoding can write
    "]"
)


def escape(text: str, keep: str = "") -> str:
    r"""Write every character that is obeyed, or not seen, as an escape such as `\u001b`.

    The escapes are those of JSON, so that what is JSON stays JSON.

    Args:
        text: What is to be printed.
        keep: Characters that are meant, such as the ends of lines.
    """
    return _ACTIVE.sub(lambda found: _written(found[0]) if found[0] not in keep else found[0], text)


def _written(character: str) -> str:
    code = ord(character)
    if code < 2**16:
        return f"\\u{code:04x}"
    high, low = divmod(code - 2**16, 2**10)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


class EscapingHook:
    """Has everything that a console of rich's prints escaped; colours of its own stay.

    Given to `Console.push_render_hook`. It is written without rich, which not all have.
    """

    def process_renderables(self, renderables: Iterable[Any]) -> list[Any]:
        """Wrap what is about to be printed."""
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    """Something that rich prints, with its text escaped once it is laid out."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else segment._replace(text=escape(segment.text, "\n"))
