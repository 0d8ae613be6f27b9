# SPDX-License-Identifier: Apache-2.0
"""The documents lead nowhere that is not there: links, and the tests that they name as proof."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_house import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TEST = re.compile(r"[\w/]*\btest_\w+\.py")
# `folder/test_file.py::test_name`: one test of it.
_ONE_TEST = re.compile(r"([\w/]*\btest_\w+\.py)::(test_\w+)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def prose(page: Path) -> str:
    """Without code, in which brackets are no links."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    words = (re.sub(r"[^\w\- ]", "", head.lower()) for head in _HEADING.findall(prose(page)))
    return {head.replace(" ", "-") for head in words}


def broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield f"{page.relative_to(ROOT)}: {link}"


def path_of(name: str) -> Path:
    return ROOT / "tests" / name.removeprefix("tests/")


def test_every_link_within_the_documents_leads_somewhere() -> None:
    assert [link for page in PAGES for link in broken_links(page)] == []


def test_every_test_that_a_document_names_is_there_by_its_path_below_tests() -> None:
    named = {name for page in PAGES for name in _TEST.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 50
    assert [name for name in sorted(named) if not path_of(name).exists()] == []


def test_every_single_test_that_a_document_names_is_in_its_file() -> None:
    missing = []
    for page in PAGES:
        for file, name in _ONE_TEST.findall(page.read_text(encoding="utf-8")):
            path = path_of(file)
            if not path.exists() or f"def {name}(" not in path.read_text(encoding="utf-8"):
                missing.append(f"{page.relative_to(ROOT)}: {file}::{name}")
    assert missing == []


def test_every_promise_of_the_security_page_names_a_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    promises = []
    for table in re.findall(r"^\| it cannot \|.*\n\| --- \|.*\n((?:\|.*\n)*)", page, re.MULTILINE):
        promises += table.splitlines()
    assert len(promises) > 10
    assert [row for row in promises if not _TEST.search(row.split("|")[2])] == []
