"""compactcli: make pretrained CNN checkpoints smaller and faster.

    model = compactcli.load("small.safetensors")     # an nn.Module in eval mode, ready to use

`import compactcli` is cheap: torch is imported with the first name that needs it.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import CompactError, UsageError

if TYPE_CHECKING:
    from .artefact import Wishes, load, open_model, save
    from .compress import compress
    from .train import fit_

try:
    __version__ = version("compactcli")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {"Wishes": "artefact", "load": "artefact", "open_model": "artefact", "save": "artefact"}
_HOMES |= {"compress": "compress", "fit_": "train"}

__all__ = ["CompactError", "UsageError", "Wishes", "__version__", "compress", "fit_", "load", "open_model", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compactcli' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
