"""How Sphinx makes a site of the repository's Markdown: ``make docs``.

Its source is the repository, not this folder, so that a link works here as in a repository browser.
"""

project = "NeMo recipes"
html_title = project
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser"]
myst_heading_anchors = 3  # as repository browsers make them, for links to headings
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/*.md", "docs/*.md"]
exclude_patterns = [".*", "runs", "outputs", "multirun", "docs/_site"]
