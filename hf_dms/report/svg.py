"""matplotlib's SVG as an element of a page: coloured by CSS variables, readable by a screen reader, small."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

TITLE = "title:"  # an artist whose gid begins so gets the rest as its title, which browsers show under the mouse
NUMBERS = ("d", "x", "y", "width", "height", "transform")  # attributes that hold numbers: a tenth of a unit is enough


def inline(text: str, name: str, title: str, summary: str, colours: dict[str, str]) -> str:
    """An `<svg>` element, as HTML has it.

    Args:
        text: a file of matplotlib, its words as text (`svg.fonttype: none`).
        name: unique on the page.
        title, summary: what it shows, for readers who cannot see it.
        colours: CSS variable → the colour that it replaces.

    Returns:
        The same picture, as wide as there is room; size and family of its words are left to the page.
    """
    root = ElementTree.fromstring(text)
    _tidy_(root, set(re.findall(r"#(\w+)", text)), {colour: f"var(--{key})" for key, colour in colours.items()})
    words = {"title": title, "desc": summary}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img"}
    root.set("aria-labelledby", " ".join(f"{name}-{tag}" for tag in words))
    for position, (tag, sentence) in enumerate(words.items()):
        root.insert(position, _element(tag, sentence, id=f"{name}-{tag}"))
    return ElementTree.tostring(root, encoding="unicode")


def _tidy_(element: Element, referred: set[str], colours: dict[str, str]) -> None:
    """Remove what draws nothing, and put CSS variables for colours, in an element and in all inside it."""
    for child in list(element):
        _tidy_(child, referred, colours)
        if child.tag in ("metadata", "style") or (child.tag in ("g", "defs") and not len(child)):
            element.remove(child)
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: _short(key, value, colours) for key, value in element.attrib.items()}
    element.tail = None
    if not (element.text or "").strip():
        element.text = None
    identifier = element.attrib.get("id", "")
    if identifier not in referred:
        element.attrib.pop("id", None)
    if identifier.startswith(TITLE):
        element.insert(0, _element("title", identifier.removeprefix(TITLE)))


def _short(key: str, value: str, colours: dict[str, str]) -> str:
    """The value of an attribute, in fewer letters."""
    if key in NUMBERS:
        value = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value)
        return " ".join(value.replace("rotate(-0 ", "rotate(0 ").split())
    if key == "style":
        value = re.sub(r"font-(size|family): [^;]*(; )?", "", value)
        return re.sub("#[0-9a-f]{6}", lambda colour: colours.get(colour[0], colour[0]), value)
    return value


def _element(tag: str, text: str, **attributes: str) -> Element:
    element = Element(tag, attributes)
    element.text = text
    return element
