"""Sphinx settings. `make docs` builds the pages and runs the examples of the docstrings."""

import sys
from pathlib import Path

import masked_softmax_ext

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "extensions")]

project = "masked_softmax_ext"
author = "The masked_softmax_ext authors"
project_copyright = author
release = version = masked_softmax_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api_table",
    "drawing",
    "formulas",
    "plot",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included pages may begin below heading level 1

add_module_names = False
python_maximum_signature_line_length = 72
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False
doctest_global_setup = """
import torch
from masked_softmax_ext import *
from masked_softmax_ext.compile_pass import explain, make_backend
"""

# The build is offline, so names from other libraries are not linked.
autodoc_mock_imports = ["transformers"]
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|collections)\..*|(.*\.)?(Backend|Figure|GraphModule|Index|Module|Tensor|dtype)",
    )
]

html_theme = "furo"
html_title = f"masked_softmax_ext {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
