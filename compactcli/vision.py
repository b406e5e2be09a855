"""The one way in to torchvision, which may have been built for another torch."""

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, also where its compiled operators were made for another torch.

    Its import then fails for want of two operators, which no classification model uses.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as problem:
        if "operator torchvision::" not in str(problem):
            raise
    _declare_operators()
    return importlib.import_module("torchvision")


@functools.cache  # the declarations live as long as the object that is returned
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
    return library
