"""How Sphinx builds the site: `make docs`. The pages are MyST Markdown, readable on their own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import proxytune_kernels

sys.path.insert(0, str(Path(__file__).parent))

# transformers imports torchao, which notes the kernels that this build of torch lacks.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

project = "proxytune_kernels"
author = "The proxytune_kernels maintainers"
copyright = author
version = release = proxytune_kernels.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_site"]
exclude_patterns = ["conf.py"]
smartquotes = False  # of options such as --trio
highlight_language = "none"  # of indented blocks: commands, output, formulas

myst_heading_anchors = 4
myst_links_external_new_tab = False
# A notebook is run as the site is built, and an error in it is the build's.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes, dtypes and ranges
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"proxytune_kernels {release}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
linkcheck_timeout = 20
