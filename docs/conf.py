"""Configuration of Sphinx: `make docs` builds the site and the API reference, warnings being errors."""

from importlib.metadata import version as installed_version

project = "partialfc"
author = "the partialfc authors"
version = release = installed_version("partialfc")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md", "_build"]  # index.md includes README.md
html_theme = "furo"
html_title = f"partialfc {version}"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

default_role = "literal"  # docstrings quote code with single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Class attributes a subclass may set", "params_style")]
