"""The site of `make docs`: the pages of this folder, and the docstrings of what `import alignloss` gives."""

project = "alignloss"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 3
default_role = "py:obj"  # `name` in a docstring: a link where there is such a name, else code
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
napoleon_use_param = False  # `hidden, weight:` stay one entry
maximum_signature_line_length = 88


def mended(app, what, name, obj, options, lines):
    """A bar is a bar, as in |y| and KL(p || q), no substitution; a field without a comment has its type alone."""
    lines[:] = [line.replace("|", r"\|") for line in lines if not line.startswith("Alias for field number")]


def setup(app):
    app.connect("autodoc-process-docstring", mended)
