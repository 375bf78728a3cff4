"""The terminal's console: it draws bars and tables, and shows texts as letters only."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Span, Text

from rlaif_ray.output import drawn, escaped, shown, shown_with_places


class PlainTextConsole(Console):
    """On standard output. Texts have no markup, no links, no control characters and no secrets in them.

    While a bar is drawn, rich sends all that the process prints through its console.
    """

    def __init__(self) -> None:
        super().__init__(file=drawn(sys.stdout), highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        # Masked before lines are broken: of a secret on two lines neither part looks like one.
        if isinstance(renderable, str):
            renderable = shown(renderable)
        elif isinstance(renderable, Text):
            renderable = _shown_text(renderable)
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control:
                yield segment
            else:
                yield Segment(escaped(text), style.update_link(None) if style and style.link else style)


def _shown_text(text: Text) -> Text:
    """A text as it is shown, in its colours."""
    told, place_after = shown_with_places(text.plain)
    if told == text.plain:
        return text
    told_text = text.blank_copy(told)
    told_text.spans = [Span(place_after(start), place_after(end), style) for start, end, style in text.spans]
    return told_text


def cell(text: object) -> Text:
    """A text of a table or a line, as it is shown: its width is then the one that is laid out."""
    return Text(shown(str(text)))
