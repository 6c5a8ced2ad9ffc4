"""The documentation's site: ``sphinx-build -W docs out/site``."""

import re

import fastzs

project = "fastzs"
version = release = fastzs.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
html_theme = "furo"
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"


def setup(app):
    """Files outside docs/ (results of the bench, for example) become downloads; on GitHub they are ordinary links."""

    def offer(app, name, source):
        source[0] = re.sub(r"(?<!!)(\[[^\]]*\])\((\.\./[^)#]+)\)", r"\1(<path:\2>)", source[0])

    app.connect("source-read", offer)
