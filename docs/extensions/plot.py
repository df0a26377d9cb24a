"""The directive ``plot``: a figure that the page's Python blocks made.

On a page with the directive, the blocks before it run while the page is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import drawings
import matplotlib
import page_code
from drawing import Drawing
from sphinx.application import Sphinx


class Plot(Drawing):
    """Its argument is the figure's name in the page's namespace."""

    def draw(self) -> str:
        document = self.env.current_document
        page = Path(self.env.doc2path(document.docname))
        blocks = page_code.python_blocks(page.read_text(encoding="utf-8"))
        before = [block for block in blocks if block[0] < self.lineno]
        names, done = document.get("page_code", (page_code.new_namespace(), 0))
        with matplotlib.rc_context(drawings.style(drawings.INK)):
            for block in before[done:]:
                page_code.run_block(page.name, block, names)
        document["page_code"] = names, len(before)
        return drawings.to_svg(names[self.arguments[0]], f"{page.stem}-{len(before)}")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("plot", Plot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
