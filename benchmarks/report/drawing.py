"""From a figure of matplotlib to SVG inside a page: coloured by its style sheet, and readable by screen readers.

The figure is drawn in stand-in colours, which become the style sheet's variables (``--c0`` … ``--c7`` for the series,
``--ink``, ``--soft``, ``--rule``, ``--paper``): a chart follows the page from light to dark, and restyling the page
restyles the charts.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from apm.images.paths import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Colours in the style sheet. The ninth series has the first colour and shape again, but hollow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "H")
"""Shapes of the series: colour is never the only sign."""
VARIABLES = ("ink", "soft", "rule", "paper", *(f"c{number}" for number in range(SERIES)))
COLOUR = {name: f"#fe{number:02x}01" for number, name in enumerate(VARIABLES)}
"""Stand-ins for the style sheet's variables; no chart has colours of its own."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "text.usetex": False,
    "text.parse_math": False,  # a dollar in a name is only a dollar
    "axes.formatter.use_mathtext": False,
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["soft"],
    "xtick.labelcolor": COLOUR["soft"],
    "ytick.labelcolor": COLOUR["soft"],
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
    "axes.edgecolor": COLOUR["rule"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOUR["rule"],
    "grid.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
}
_XLINK = "{http://www.w3.org/1999/xlink}href"
_KEPT = ("fill", "stroke", "opacity", "font-size", "text-anchor")


def colour(series: int) -> str:
    """Stand-in for the colour of a series."""
    return COLOUR[f"c{series % SERIES}"]


def mark(axes: Axes, x: float, y: float, series: int, said: str, size: float = 7.5) -> None:
    """Put the mark of a series at a place, with what is said of it when it is pointed at or reached by the keyboard."""
    hollow = series // SERIES % 2
    axes.plot(
        [x],
        [y],
        MARKERS[series % SERIES],
        color=COLOUR["paper"] if hollow else colour(series),
        markeredgecolor=colour(series) if hollow else COLOUR["paper"],
        markeredgewidth=1.6 if hollow else 1,
        markersize=size,
        gid=f"say:{said}",
        zorder=4,
    )


def mark_class(series: int) -> str:
    """Classes of the mark of a series in the style sheet, for marks outside of charts."""
    return f"mark s{series % SERIES}" + (" second" if series // SERIES % 2 else "")


def shape(x: float, y: float, series: int, r: float) -> str:
    """Path data of the mark of a series about (x, y), of half-width `r`."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    style = MarkerStyle(MARKERS[series % SERIES])
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(2 * r, -2 * r).translate(x, y))
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
    return "".join(
        "Z" if code == Path.CLOSEPOLY else letters[code] + " ".join(f"{value:.2f}" for value in points)
        for points, code in path.iter_segments()
    )


def to_markup(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return a figure as an SVG element to stand in HTML.

    Args:
        figure: made within `STYLE`. Artists with a gid ``say:TEXT`` can be pointed at and reached by the arrow keys.
        name: of the chart, its own in the page: ids begin with it.
        title: said by screen readers, with the description.
        description: what is drawn.
    """
    import matplotlib

    written = io.StringIO()
    # by the name, so that the same chart has the same bytes, and no two charts of a page the same ids
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page's font draws it
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    drawn = ElementTree.fromstring(written.getvalue())
    size = drawn.get("viewBox", "")
    used = {element.get(_XLINK, "") for element in drawn.iter()}
    _clean(drawn, name, used)
    drawn.attrib.clear()
    drawn.attrib.update({"viewBox": size, "role": "group", "tabindex": "0"})
    drawn.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        child.text = printable(text)
        drawn.insert(place, child)
    return Markup(ElementTree.tostring(drawn, encoding="unicode"))


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Make an element and all below it the page's: no name spaces, styles, clips, colours or ids of matplotlib's."""
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        tag = child.tag.rpartition("}")[2]
        if tag in ("metadata", "style", "clipPath"):
            element.remove(child)
        else:
            _clean(child, name, used)
    attributes = element.attrib
    said = attributes.get("id", "")
    if f"#{said}" not in used:
        attributes.pop("id", None)
    attributes.pop("clip-path", None)
    if (target := attributes.pop(_XLINK, None)) is not None:
        attributes["href"] = target
    for line in attributes.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.startswith(("stroke-", "fill-")) or key in _KEPT:
            attributes[key] = value
    for key, value in attributes.items():
        if key in ("fill", "stroke"):
            attributes[key] = _VARIABLE.get(value, value)
        elif key in ("d", "x", "y", "transform"):  # a hundredth of a pixel is enough
            attributes[key] = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}", " ".join(value.split()))
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if element.tag != "text":
        element.text = None
    element.tail = None
    if said.startswith("say:"):
        text = said.removeprefix("say:")
        attributes.update({"class": "said", "role": "img", "tabindex": "-1", "aria-label": text})
        tip = ElementTree.Element("title")
        tip.text = text
        element.insert(0, tip)


_VARIABLE = {value: f"var(--{name})" for name, value in COLOUR.items()}


def short(text: str, width: float) -> str:
    """Cut a name to what `width` pixels hold; the whole of it is in the table behind the chart."""
    text, room = re.sub(r"\s+", " ", printable(text)), int(width / 6.2)
    return text if len(text) <= room else text[: room - 1] + "…"
