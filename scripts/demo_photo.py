"""Write a real photograph to a file.

NASA's portrait of the astronaut Eileen Collins, which scikit-image carries.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from skimage import data


def main() -> None:
    """Write it to the path given."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.astronaut()).save(path)  # type: ignore[no-untyped-call]
    print(f"{path}: 512 x 512, from skimage.data.astronaut")


if __name__ == "__main__":
    main()
