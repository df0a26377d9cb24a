"""The directive ``drawing``: inlines a drawing of docs/drawings.py as SVG."""

from __future__ import annotations

import html
from typing import Any, ClassVar

import drawings
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Drawing(SphinxDirective):
    required_arguments = 1
    has_content = True  # the caption
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(drawings.__file__)
        figure = nodes.figure(classes=["drawing"])
        alt = html.escape(self.options["alt"])
        picture = f'<div role="img" aria-label="{alt}">{self.draw()}</div>'
        figure += nodes.raw("", picture, format="html")
        if self.content:
            text, messages = self.parse_inline(" ".join(self.content))
            figure += nodes.caption("", "", *text)
            return [figure, *messages]
        return [figure]

    def draw(self) -> str:
        """The picture as HTML: wide, and narrow for phones. The page's style shows one of them."""
        name = self.arguments[0]
        wide, narrow = drawings.svg(name), drawings.svg(name, narrow=True)
        return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
