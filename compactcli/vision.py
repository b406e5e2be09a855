"""The one way in to torchvision, which may have been built for another torch."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

T = TypeVar("T")


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, also where its compiled operators were made for another torch."""
    return cured(lambda: importlib.import_module("torchvision"))


def cured(load: Callable[[], T]) -> T:
    """What `load` returns, which may import torchvision.

    Where that was built for another torch its import fails for want of two operators, which no classification model uses:
    then they are declared, and `load` is called again.
    """
    try:
        return load()
    except RuntimeError as problem:
        if "operator torchvision::" not in str(problem):
            raise
    _declare_operators()
    return load()


@functools.cache  # the declarations live as long as the object that is returned
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
    return library
