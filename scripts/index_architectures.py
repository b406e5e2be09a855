"""Writes compactcli/signatures.json from the definitions; to run after a new network or torchvision."""

import json
from pathlib import Path

from compactcli import detection


def text(tree: dict[str, list[object]]) -> str:
    """The index as JSON, one network per line so that changes can be read."""
    parts = (json.dumps(key) + ": [\n" + ",\n".join(map(json.dumps, entries)) + "\n]" for key, entries in tree.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    Path(detection.__file__).with_name("signatures.json").write_text(text(detection.index()))
