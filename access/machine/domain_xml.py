# SPDX-License-Identifier: Apache-2.0
"""A small tree of an XML text that a stranger wrote. Pure.

The standard library's expat, told to refuse what a domain's description never has: a document type,
and so entities of any kind, which is what makes XML dangerous. Depth, elements and text are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from xml.parsers import expat

_MAX_DEPTH = 40
# A machine with 254 disks has some thousand.
_MAX_ELEMENTS = 20_000


class XmlError(ValueError):
    """Not XML, or not of the kind that is read here."""


class Element:
    """An element with its attributes, the text directly in it, and its children."""

    def __init__(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.tag = tag
        self.attributes = attributes
        self.text = ""
        self.children: list[Element] = []

    def get(self, name: str, default: str = "") -> str:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def find(self, path: str) -> Element:
        """Return the first element at `a/b`; an empty one where there is none."""
        here = self
        for tag in path.split("/"):
            here = next((child for child in here.children if child.tag == tag), _nothing())
        return here

    def all(self, tag: str) -> Iterator[Element]:
        return (child for child in self.children if child.tag == tag)

    def has(self, tag: str) -> bool:
        return any(child.tag == tag for child in self.children)


def made(tag: str, *children: Element, text: str = "", **attributes: str) -> Element:
    """Return a new element. An attribute whose name is a word of Python's ends in `_`."""
    element = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    element.text = text
    element.children = list(children)
    return element


def render_xml(root: Element) -> str:
    """Return an element as a text that `parse_xml` reads as the same one."""
    lines: list[str] = []
    _render(root, 0, lines)
    return "\n".join(lines) + "\n"


def _render(element: Element, depth: int, lines: list[str]) -> None:
    words = "".join(f" {name}='{_escaped(value)}'" for name, value in element.attributes.items())
    head = f"{'  ' * depth}<{element.tag}{words}"
    text = _escaped(element.text.strip())
    if not element.children:
        lines.append(f"{head}>{text}</{element.tag}>" if text else f"{head}/>")
        return
    lines.append(f"{head}>{text}")
    for child in element.children:
        _render(child, depth + 1, lines)
    lines.append(f"{'  ' * depth}</{element.tag}>")


def _escaped(text: str) -> str:
    for letter, name in (("&", "amp"), ("<", "lt"), (">", "gt"), ("'", "apos"), ('"', "quot")):
        text = text.replace(letter, f"&{name};")
    return text


def _nothing() -> Element:
    return Element("", {})


def parse_xml(raw: bytes) -> Element:
    """Return the root. Raises XmlError."""
    root = _nothing()
    path = [root]
    count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(path) > _MAX_DEPTH or count > _MAX_ELEMENTS:
            raise XmlError("it has too many elements, or they are nested too deeply")
        element = Element(tag, attributes)
        path[-1].children.append(element)
        path.append(element)

    def end(tag: str) -> None:
        path.pop()

    def characters(text: str) -> None:
        path[-1].text += text

    def refuse(*_: object) -> None:
        raise XmlError("it declares a document type, which such a description never does")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise XmlError(f"it is not XML: {error}") from error
    except (ValueError, LookupError) as error:
        if isinstance(error, XmlError):
            raise
        raise XmlError(f"it cannot be decoded: {error}") from error
    return root.children[0]
