"""Markdown as GitHub renders it: links, anchors, fenced lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["anchors_in", "broken_links", "command_lines", "fenced_blocks", "links_in", "pages_of"]

_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\n(?P<body>.*?)^(?P=fence)\s*$", re.M | re.S)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s<>]+(?:\([^()]*\))?)>?[^()]*\)")
_REMOTE = re.compile(r"^[a-z][a-z0-9+.-]*:", re.I)


def pages_of(root: Path) -> list[Path]:
    """The Markdown files of a checkout, without hidden folders and what commands write."""
    return sorted(
        page
        for page in root.rglob("*.md")
        if not any(part.startswith(".") for part in page.relative_to(root).parts)
        and page.relative_to(root).parts[:1] != ("benchmark",)
        and (page.parent == root / "engines" or "engines" not in page.relative_to(root).parts)
    )


def fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    for match in _FENCE.finditer(text):
        yield match["language"], match["body"]


def command_lines(text: str) -> Iterator[str]:
    """Lines of fenced blocks that name this package's command, without prompt and comment."""
    for _, body in fenced_blocks(text):
        for line in body.splitlines():
            command = re.sub(r"\s+#.*", "", line.removeprefix("$ ").strip())
            if command.startswith(("mmvision ", "python -m mmvision_export")):
                yield command


def links_in(text: str) -> list[str]:
    """Targets of links and pictures, outside of code."""
    prose = re.sub(r"`[^`\n]+`", "`code`", _FENCE.sub("", text))
    return [match[1] for match in _LINK.finditer(prose)]


def anchors_in(text: str) -> set[str]:
    """Anchors of the headings: lower case, no punctuation, hyphens for blanks, numbered if met again.

    References:
        https://docs.github.com/en/get-started/writing-on-github, *Section links*.
    """
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", _FENCE.sub("", text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = 1
        unique = slug
        while unique in anchors:
            unique, number = f"{slug}-{number}", number + 1
        anchors.add(unique)
    return anchors


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to no file, or to no heading of the file."""
    broken = []
    for link in links_in(page.read_text()):
        if _REMOTE.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        if not target.exists() or (
            anchor and (target.suffix != ".md" or anchor not in anchors_in(target.read_text()))
        ):
            broken.append(link)
    return broken
