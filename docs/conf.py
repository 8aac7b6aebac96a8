"""The site, built by ``bash launch/docs.sh``; nothing on it is loaded from other places."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

import fmjax  # noqa: E402

project, author, copyright = "fmjax", "the authors of fmjax", "the authors of fmjax, Apache-2.0"
version = release = fmjax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "offline_math",
    "faces",
    "literate",
    "tables",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
myst_url_schemes = ("http", "https", "mailto")
exclude_patterns = ["extensions", "stored"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "fmjax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True
napoleon_use_ivar = True
toc_object_entries = False
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|obj|data|attr|exc|meth|func|mod|type)", r".*")
]  # of docstrings; guide pages use links
pygments_style, pygments_dark_style = "friendly", "github-dark"
linkcheck_ignore = [r"https?://.*"]
