"""Writes the indices beside compactcli/signatures.py from the definitions; to run after a new network or torchvision.

With `--timm` also that of timm's networks, in some minutes; to run after a new timm.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactcli import signatures


def text(tree: Mapping[str, list[Any]], separators: tuple[str, str] = (", ", ": ")) -> str:
    """The index as JSON, one network per line so that changes can be read."""
    parts = (
        json.dumps(key) + ": [\n" + ",\n".join(json.dumps(entry, separators=separators) for entry in entries) + "\n]"
        for key, entries in tree.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    folder = Path(signatures.__file__).parent
    (folder / "signatures.json").write_text(text(signatures.index()))
    if "--timm" in sys.argv[1:]:
        (folder / "signatures-timm.json").write_text(text(signatures.timm_index(), (",", ":")))
