"""What to type to install a part of this package that is missing."""

from __future__ import annotations

from pathlib import Path

__all__ = ["install_command"]


def install_command(extra: str, *, checkout: Path | None = None) -> str:
    """The command that installs an extra.

    In a checkout it installs the checkout, because that is the code which runs: `pip install
    '.[cpu]'`. Elsewhere it names the package: `pip install 'mmvision-export[cpu]'`.

    Args:
        extra: A name of `[project.optional-dependencies]`.
        checkout: Folder that this package lies in; its own if None.
    """
    checkout = Path(__file__).parents[2] if checkout is None else checkout
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install 'mmvision-export[{extra}]'"
    place = "." if checkout.resolve() == Path.cwd().resolve() else str(checkout)
    return f"pip install '{place}[{extra}]'"
