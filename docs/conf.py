"""Settings of ``make docs``, which builds a site of the Markdown files with Sphinx.

The source folder is the repository, so that links work on the site and in a repository browser.
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
