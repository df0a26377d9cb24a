"""The directive ``api-table``: names, their docstrings' first sentences, and links to the source.

Its content is a list of full names, one a line. sphinx.ext.viewcode makes the pages of the sources.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.util.docutils import SphinxDirective


class ApiTable(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        body = nodes.tbody()
        for full_name in filter(None, self.content):
            module, name = full_name.rsplit(".", 1)
            with mock(self.config.autodoc_mock_imports):
                described = inspect.unwrap(getattr(import_module(module), name))
            body += nodes.row("", *map(self.entry, self.cells(full_name, described)))
        columns = [nodes.colspec(colwidth=width) for width in (30, 60, 10)]
        group = nodes.tgroup("", *columns, body, cols=len(columns))
        return [nodes.table("", group, classes=["api-table"])]

    def cells(self, full_name: str, described: Any) -> tuple[list[nodes.Node], ...]:
        name = full_name.removeprefix("masked_softmax_ext.")
        reference = addnodes.pending_xref(
            "",
            nodes.literal("", name),
            refdomain="py",
            reftype="obj",
            reftarget=full_name,
            refdoc=self.env.docname,
            refwarn=True,
        )
        summary, _ = self.parse_inline(first_sentence(described))
        page = f"_modules/{described.__module__.replace('.', '/')}.html#{described.__name__}"
        source = nodes.reference("", "source", refuri=page, internal=True)
        return [reference], summary, [source]

    @staticmethod
    def entry(content: list[nodes.Node]) -> nodes.entry:
        return nodes.entry("", nodes.paragraph("", "", *content))


def first_sentence(described: Any) -> str:
    paragraph = (inspect.getdoc(described) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.)\s", paragraph)[0]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("api-table", ApiTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
