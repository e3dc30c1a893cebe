"""Records changed by a test, as if they had been written so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def content_of(record: Path | str) -> dict[str, Any]:
    """A record's content without its checksum, which changed content would not have.

    Args:
        record: Its file, or the text of one.
    """
    text = record if isinstance(record, str) else record.read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    assert content.pop("content_sha256")
    return content
