"""Figures as SVG files, and as inline SVG, which takes its colours from the page's style sheet."""

import io
import re
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from lmms_plugin.report.figures.palette import TONES

_SIZE = re.compile(r'<svg [^>]*?width="([\d.]+)pt" height="([\d.]+)pt"[^>]*?>', re.DOTALL)
_ID = re.compile(r'(\bid="|url\(#|href="#)([^")]+)')
_PLACES = re.compile(r'\b(?:d|x|y|x1|y1|x2|y2|points|transform|width|height)="[^"]*"')
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline(figure: Figure, name: str, title: str, description: str) -> str:
    """Render a figure as an SVG element with title and description.

    Args:
        figure: Matplotlib figure.
        name: Name that is unique on the page; every id in the SVG starts with it.
        title: Accessible name of the figure.
        description: Text alternative for people who do not see the figure.
    """
    drawn = svg(figure)
    body = drawn[drawn.index("<svg") :]
    found = _SIZE.search(body)
    if found is None:
        raise ValueError(f"expected an SVG with a size from matplotlib, got {body[:80]!r}")
    width, height = map(float, found.groups())
    body = body[found.end() : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    body = _ID.sub(rf"\g<1>{name}-\g<2>", body)
    body = _PLACES.sub(lambda place: _NUMBER.sub(lambda number: f"{float(number.group()):.2f}", place.group()), body)
    for tone, (light, _) in TONES.items():
        body = body.replace(light, f"var(--{tone})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    return (
        f'<svg class="figure" viewBox="0 0 {width:.0f} {height:.0f}" style="--w:{width:.0f}" role="img"'
        f' aria-labelledby="{name}-title" aria-describedby="{name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{body}</svg>'
    )


def svg(figure: Figure) -> str:
    """Render a figure as an SVG file; equal figures give equal files."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lmms-plugin", "text.parse_math": False}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "lmms-plugin"})
    return out.getvalue()
