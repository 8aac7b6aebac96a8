"""Render mathematics as MathML, which browsers show without scripts, fonts or other files."""

from latex2mathml.converter import convert


def setup(app):
    """Register the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _visit_inline(translator, node):
    translator.body.append(convert(node.astext(), display="inline"))
    _skip()


def _visit_block(translator, node):
    translator.body.append(f'<div class="math">{convert(_lines(node.astext()), display="block")}</div>')
    _skip()


def _lines(latex: str) -> str:
    """Put an equation of several lines into an ``aligned`` environment, as Sphinx does for other renderers."""
    return rf"\begin{{aligned}}{latex}\end{{aligned}}" if r"\\" in latex and r"\begin" not in latex else latex


def _skip():
    from docutils.nodes import SkipNode

    raise SkipNode
