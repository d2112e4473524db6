"""Sphinx settings for ``make docs``, which builds a site from the Markdown files.

The source folder is the repository's root, so that the same links work on the site and in a
repository browser.
"""

project = "NeMo recipes"
html_title = project
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser"]
myst_heading_anchors = 3  # headings down to level 3 are link targets, as on GitHub
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/*.md", "docs/*.md"]
exclude_patterns = [".*", "runs", "outputs", "multirun", "docs/_site"]
