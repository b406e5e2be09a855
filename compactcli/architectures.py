"""Networks by name.

torchvision and timm are imported on demand.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import cifar, usercode
from .errors import CompactError, brief
from .recipe import Preprocessing, preprocessing_of
from .vision import torchvision

Kwargs = Mapping[str, Any]

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Preprocessing((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # CSG, LinearConv
HINGE = Preprocessing((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616))  # 125.3 123.0 113.9, 63.0 62.1 66.7 of 255
PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # HetConv does not normalise

ALIASES = {"cifar:vgg11_bn": "cifar:vgg11", "cifar:vgg16_bn": "cifar:vgg16"}  # these have batch normalisation anyway

_CIFAR_PREPROCESSING = {
    "vgg16_hetconv": PLAIN,
    **dict.fromkeys(("resnet164", "resnext20", "resnext164", "wrn16_10", "vgg16_linear3", "densenet12_40"), HINGE),
}

# The arguments that describe a network. Others load weights, name files or need objects.
_TORCHVISION_KWARGS = frozenset({"num_classes", "aux_logits", "transform_input", "image_size", "width_mult", "dropout"})
_TIMM_KWARGS = frozenset({"num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate", "global_pool"})
LARGEST = 1 << 20  # no class count, width or image size is larger

# As torchvision builds these two for its own weights, which expect the inputs rescaled.
_TORCHVISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True},
    "inception_v3": {"transform_input": True},
}


@dataclass(frozen=True)
class Architecture:
    """A network without weights: what builds it, and what its input looks like."""

    name: str
    kwargs: Kwargs
    input_shape: tuple[int, int, int]  # channels, height, width
    preprocessing: Preprocessing
    factory: Callable[..., Any] = field(repr=False, compare=False)

    def build(self, *, device: str = "cpu", initialise: bool = False) -> nn.Module:
        """The network in training mode; its parameters hold arbitrary values unless `initialise`.

        Computed buffers are right either way, except on the meta device. Raises CompactError if the
        factory refuses the arguments or returns something else than a module.
        """
        try:
            if initialise:
                network = self.factory(**self.kwargs)
            else:
                with _Uninitialised("meta" if device == "meta" else "cpu"):
                    network = self.factory(**self.kwargs)
        except Exception as problem:  # of the user's own code, or of a library for arguments that it does not know
            raise CompactError(f"{title(self.name, self.kwargs)} cannot be built: {brief(str(problem))}") from problem
        if isinstance(network, nn.DataParallel):
            network = network.module
        if not isinstance(network, nn.Module):
            raise CompactError(f"{self.name} returns a {type(network).__name__}, not a torch.nn.Module")
        return network.to(device)


class _Uninitialised(TorchFunctionMode):
    """Leaves parameters as allocated, on `device`: they are about to be loaded, so no time goes into random values.

    Everything else runs where it would, so that networks which compute with tensors while they are
    built (regnet, swin) can be built for the meta device too.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": self.device})
        subject = args[0] if args else kwargs.get("tensor")  # by name from torch.nn.init
        if isinstance(subject, nn.Parameter):
            if func.__name__.endswith("_") and not func.__name__.startswith("__"):
                return subject  # an operation in place
            if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return True  # what torch.nn.init.trunc_normal_ asks before it draws
        return func(*args, **kwargs)


def names() -> list[str]:
    """Every name that `get` takes, except timm's (`timm:` and a name of `timm.list_models()`)."""
    return [*(f"cifar:{name}" for name in cifar.NETWORKS), *torchvision_names()]


def get(name: str, kwargs: Kwargs | None = None, input_shape: tuple[int, int, int] | None = None) -> Architecture:
    """The architecture of that name, with its own input shape unless one is given.

    Raises CompactError with near matches for an unknown name, and for arguments it does not take.
    """
    kwargs = dict(kwargs or {})
    name = ALIASES.get(name, name)
    library, colon, own = name.partition(":")
    if library == "cifar" and own in cifar.NETWORKS:
        architecture = _cifar(own, kwargs)
    elif library == "timm" and colon:
        architecture = _timm(own, kwargs)
    elif (bare := own if library == "torchvision" else name) in torchvision_names():
        architecture = _torchvision(bare, kwargs)
    else:
        way = "; one of your own is file.py:factory" if name.endswith(".py") else _suggestion(name)
        raise CompactError(f"unknown architecture {brief(repr(name))}{way}")
    return architecture if input_shape is None else _with_input(architecture, input_shape)


def configured(
    config: Mapping[str, Any], kwargs: Kwargs | None = None, input_shape: tuple[int, int, int] | None = None
) -> Architecture:
    """timm's architecture that the config.json of a folder names, with the input that its weights were trained on.

    timm's own defaults stand in for what the file does not say.
    Raises CompactError as `get` does, and where what the file says is none of that.
    """
    classes = config.get("num_classes")
    given = {"num_classes": classes} if isinstance(classes, int) else {}
    plain = get(f"timm:{config['architecture']}", {**given, **(kwargs or {})})
    tree = config.get("pretrained_cfg", config)
    try:
        channels, height, width = (int(side) for side in tree.get("input_size") or plain.input_shape)
        share = float(tree.get("crop_pct") or plain.input_shape[2] / (plain.preprocessing.resize or plain.input_shape[2]))
        own = {name: tree.get(name) or getattr(plain.preprocessing, name) for name in ("mean", "std", "interpolation")}
        described = preprocessing_of({**own, "resize": math.floor(width / share)})
        if min(channels, height, width) < 1 or len(described.mean) != channels or len(described.std) != channels:
            raise ValueError(f"an input of {channels}x{height}x{width}")
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as problem:
        raise CompactError(f"what config.json says of the input is damaged: {brief(str(problem))}; give --arch") from None
    trained = replace(plain, input_shape=(channels, height, width), preprocessing=described)
    wished = input_shape or (trained.kwargs.get("in_chans", channels), height, width)
    return _with_input(trained, wished)


def user(spec: str, kwargs: Kwargs | None = None, input_shape: tuple[int, int, int] | None = None) -> Architecture:
    """The architecture that the user's own `file.py:factory` or `package.module:factory` builds.

    Runs the user's code: only for what the user named on the command line, never for what a file names.
    The preprocessing is ImageNet's for three channels. Raises CompactError if there is no such factory.
    """
    if input_shape is None:
        raise CompactError(f"{spec} does not say what its input looks like; give --input-shape")
    source, _, function = spec.rpartition(":")
    factory = usercode.named(spec)
    if not callable(factory):
        raise CompactError(f"{spec} is no factory; wanted a function or class that builds the network")
    bare = f"{Path(source).name}:{function}" if source.endswith(".py") else spec  # files hold no paths
    build = functools.partial(usercode.called, factory)
    return _with_input(Architecture(bare, dict(kwargs or {}), (3, *input_shape[1:]), IMAGENET, build), input_shape)


def _cifar(name: str, kwargs: dict[str, Any]) -> Architecture:
    factory = cifar.NETWORKS[name]
    allowed = parameters(factory)
    _check_kwargs(f"cifar:{name}", kwargs, allowed)
    preprocessing = _CIFAR_PREPROCESSING.get(name, CIFAR)
    if "keys" in allowed:
        keys = kwargs.setdefault("keys", "akamaster")
        kwargs.setdefault("shortcut", cifar.DEFAULT_SHORTCUT.get(keys))
        preprocessing = IMAGENET if keys == "akamaster" else CIFAR
    architecture = Architecture(f"cifar:{name}", kwargs, (3, 32, 32), preprocessing, factory)
    channels = kwargs.get("in_channels", 3)
    if type(channels) is not int:
        raise CompactError(f"cifar:{name} cannot take in_channels={brief(repr(channels))}")
    return _with_input(architecture, (channels, 32, 32))


def _torchvision(name: str, kwargs: dict[str, Any]) -> Architecture:
    _check_kwargs(name, kwargs, _TORCHVISION_KWARGS)
    models = torchvision().models
    builder = functools.partial(models.get_model, name)
    if name in _TORCHVISION_DEFAULTS:
        kwargs = {**_TORCHVISION_DEFAULTS[name], **kwargs}
        builder = functools.partial(builder, init_weights=False)  # else it warns, and takes seconds
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    preprocessing = Preprocessing(
        tuple(transforms.mean), tuple(transforms.std), transforms.resize_size[0], transforms.interpolation.value
    )
    size = transforms.crop_size[0]
    architecture = Architecture(name, kwargs, (3, size, size), preprocessing, builder)
    own_size = kwargs.get("image_size", 224 if name.startswith("vit_") else size)  # vit_h_14's best weights are of 518
    return _with_input(architecture, (3, own_size, own_size))


def _timm(name: str, kwargs: dict[str, Any]) -> Architecture:
    if not has_timm():
        raise CompactError(f"timm:{name} needs timm; pip install compactcli[timm]")
    models = timm()
    if not models.is_model(name):
        near = difflib.get_close_matches(name, models.list_models(), n=3)
        raise CompactError(f"timm has no model {brief(repr(name))}{_or_none(near)}")
    _check_kwargs(f"timm:{name}", kwargs, _TIMM_KWARGS)
    try:
        own = models.get_pretrained_cfg(name)
    except RuntimeError as problem:
        raise CompactError(brief(str(problem))) from problem
    resize = math.floor(own.input_size[-1] / own.crop_pct)
    preprocessing = Preprocessing(tuple(own.mean), tuple(own.std), resize, own.interpolation)
    factory = functools.partial(models.create_model, name, pretrained=False)
    architecture = Architecture(f"timm:{name}", kwargs, tuple(own.input_size), preprocessing, factory)
    size = kwargs.get("img_size", own.input_size[-1])
    return _with_input(architecture, (kwargs.get("in_chans", own.input_size[0]), size, size))


def _with_input(architecture: Architecture, input_shape: tuple[int, int, int]) -> Architecture:
    """The same with another input shape: images are then scaled to it, other channels centred at one half."""
    if input_shape == architecture.input_shape:
        return architecture
    preprocessing = architecture.preprocessing
    if input_shape[1:] != architecture.input_shape[1:]:
        preprocessing = replace(preprocessing, resize=None)
    channels = input_shape[0]
    if channels != len(preprocessing.mean):
        preprocessing = replace(preprocessing, mean=(0.5,) * channels, std=(0.5,) * channels)
    return replace(architecture, input_shape=input_shape, preprocessing=preprocessing)


def _check_kwargs(name: str, kwargs: Kwargs, allowed: Collection[str]) -> None:
    """Raises CompactError for an argument that is not allowed or not a plain value of sensible size."""
    for key, value in kwargs.items():
        if key not in allowed:
            raise CompactError(f"{name} does not take the argument {brief(repr(key))}, only {', '.join(sorted(allowed))}")
        least = 0 if key == "num_classes" and name.startswith("timm:") else 1  # timm's networks without a head
        if not isinstance(value, bool | int | float | str | None) or (
            isinstance(value, int) and not isinstance(value, bool) and not least <= value <= LARGEST
        ):
            raise CompactError(f"{name} cannot take {key}={brief(repr(value))}")


def parameters(factory: Callable[..., Any]) -> frozenset[str]:
    """The keyword-only arguments of a factory: the ones a user may give."""
    own = inspect.signature(factory).parameters.values()
    return frozenset(p.name for p in own if p.kind is p.KEYWORD_ONLY)


@functools.cache
def torchvision_names() -> list[str]:
    """The names of torchvision's classification models."""
    models = torchvision().models
    listed: list[str] = models.list_models(module=models)
    return listed


def has_timm() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


def timm() -> ModuleType:
    """timm, where it is installed."""
    torchvision()  # timm imports it, without the cure
    return importlib.import_module("timm")


def _suggestion(name: str) -> str:
    """The known names nearest to this one, whether or not a library is named in front of it."""
    known = names()
    bare = difflib.get_close_matches(name.rpartition(":")[2], {full.rpartition(":")[2]: None for full in known}, n=3)
    near = [full for match in bare for full in known if full.rpartition(":")[2] == match]
    return _or_none(sorted(near, key=lambda full: (":" in full) != (":" in name))[:3])


def _or_none(near: list[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def title(name: str, kwargs: Kwargs) -> str:
    """The name and the arguments beside it, for a line of text."""
    told = ", ".join(f"{brief(key)}={brief(str(value))}" for key, value in kwargs.items())
    return f"{name} ({told})" if told else name
