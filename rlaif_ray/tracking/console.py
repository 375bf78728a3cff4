"""The terminal's console: it draws bars and tables, and of texts that it is given only their letters."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from rlaif_ray.output import drawn, shown


class PlainTextConsole(Console):
    """On standard output. Texts mean nothing but themselves: no markup, no links, no control characters."""

    def __init__(self) -> None:
        super().__init__(file=drawn(sys.stdout), highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control:
                yield segment
            else:
                yield Segment(shown(text), style.update_link(None) if style and style.link else style)


def cell(text: object) -> Text:
    """A text of a table or a line, as it is shown: its width is then the one that is laid out."""
    return Text(shown(str(text)))
