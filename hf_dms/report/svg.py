"""matplotlib's SVG as an element of a page: small, coloured by CSS variables, and readable by screen readers."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

TITLE = "title:"  # prefix of an artist's gid; the rest becomes its title, which browsers show under the mouse
NUMBERS = ("d", "x", "y", "width", "height", "transform")  # attributes with numbers; they are rounded to a tenth


def inline(text: str, name: str, title: str, summary: str, colours: dict[str, str]) -> str:
    """An `<svg>` element, as HTML has it.

    Args:
        text: an SVG file of matplotlib with text as text (`svg.fonttype: none`).
        name: a name that is unique on the page.
        title, summary: its content, for readers who cannot see it.
        colours: CSS variable → the colour that it replaces.

    Returns:
        The same picture, scaled to the available width. The page sets the size and family of its fonts.
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
    """Remove elements that draw nothing, and replace colours by CSS variables, in an element and all inside."""
    for child in list(element):
        # Children first: a group whose children were all removed is empty then, and is removed too.
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
    """The value of an attribute, shortened."""
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
