"""A network as a list of ATen operations, traced with fake tensors: no memory, no arithmetic, no side effects.

Code that asks for the values of tensors is run on random images instead; the branches that it takes
are then part of the graph.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import CompactError

ARITHMETIC = frozenset(name + ending for name in ("add", "sub", "rsub", "mul", "div", "pow") for ending in ("", "_"))
BATCH = 2  # a batch of one would hide the batch axis among the axes of size one


@dataclass(frozen=True)
class Graph:
    """The operations in the order they ran. `node.meta["val"]` holds each result's shape and dtype."""

    nodes: tuple[fx.Node, ...]
    tensors: dict[fx.Node, str]  # placeholder -> name of the parameter or buffer
    parameters: frozenset[fx.Node]  # the placeholders of parameters
    owners: dict[fx.Node, str]  # node -> path of the module whose forward issued it
    constants: dict[fx.Node, Tensor]  # tensors that the code holds beside parameters and buffers
    image: fx.Node  # the placeholder of the input
    chunks: frozenset[fx.Node]  # splits whose pieces are counted in code, not their sizes
    baked: bool  # the code depends on values: what it did on random images is what the graph says


def trace(model: nn.Module, input_shape: Sequence[int], *, train: bool = False, batch: int = BATCH) -> Graph:
    """The graph of `model` for images of shape (channels, height, width), in eval mode unless `train`.

    Sizes are baked in, the number of images among them.

    The model and its memory are untouched: a shadow copy on fake tensors is what runs.
    Raises CompactError where the network does not run.
    """
    with named_failure(f"on images of shape {tuple(input_shape)}"):
        try:
            return _trace(model, input_shape, train, batch, baked=False)
        except DataDependentOutputException:
            return _trace(model, input_shape, train, batch, baked=True)


def _trace(model: nn.Module, input_shape: Sequence[int], train: bool, batch: int, *, baked: bool) -> Graph:
    shadow, mode = _shadow(model, fake=not baked)
    shadow.train(train)
    names = [*dict(shadow.named_parameters()), *dict(shadow.named_buffers())]
    values = [*dict(shadow.named_parameters()).values(), *dict(shadow.named_buffers()).values()]

    def run(values: list[Tensor], image: Tensor) -> Any:
        return torch.func.functional_call(shadow, dict(zip(names, values, strict=True)), (image,))

    calls = _Calls()
    with silent(), _notes(shadow, calls) as (owners, chunks), torch.no_grad(), calls:
        traced = make_fx(run, tracing_mode="real", _error_on_data_dependent_ops=not baked)
        module = traced(values, _image(batch, input_shape, mode))
    nodes = tuple(module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    constants = {node: getattr(module, str(node.target)) for node in nodes if node.op == "get_attr"}
    tensors = dict(zip(placeholders, names, strict=False))
    parameters = frozenset(placeholders[: len(dict(shadow.named_parameters()))])
    return Graph(nodes, tensors, parameters, owners, constants, placeholders[-1], frozenset(chunks), baked)


def operation(node: fx.Node) -> str:
    """The name of a node's ATen operation without namespace and overload: aten.add.Tensor -> add."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else str(node.target)


def per_image(graph: Graph) -> set[fx.Node]:
    """The nodes whose value depends on the images; the others are computed once for a batch."""
    found = {graph.image}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def run_fake(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    train: bool | None = False,
    batch: int = BATCH,
    change: Callable[[nn.Module], None] = lambda shadow: None,
    numbers: "Numbers | None" = None,
) -> Any:
    """Run the network on fake tensors, after a `change` to its shadow copy: nothing is computed, changed or allocated.
    Its output in the last mode run, of which only the shapes mean anything. `numbers` takes down those of eval mode.

    In eval mode, in train mode, or in both, one after the other, where `train` is None.
    Code that depends on the values of tensors runs on random images, as in `trace`.
    Raises CompactError with the reason where it does not run.
    """
    try:
        return _run(model, input_shape, train, batch, change, numbers, fake=True)
    except DataDependentOutputException:
        return _run(model, input_shape, train, batch, change, numbers, fake=False)


def _run(
    model: nn.Module,
    input_shape: Sequence[int],
    train: bool | None,
    batch: int,
    change: Callable[[nn.Module], None],
    numbers: "Numbers | None",
    *,
    fake: bool,
) -> Any:
    given: Any = None
    images = f"{'x'.join(map(str, input_shape))} images (--input-shape)"
    shadow, mode = _shadow(model, fake=fake)
    with silent(), mode, torch.no_grad():
        change(shadow)
        for training in (False, True) if train is None else (train,):
            shadow.train(training)
            for module in shadow.modules():
                if isinstance(module, _NormBase):  # what shapes do is the same in both modes, and tracing it takes long in one
                    module.eval()
            noting = nullcontext() if training or numbers is None else numbers
            with named_failure(f"in {'train' if training else 'eval'} mode on {images}"), noting:
                given = shadow(_image(batch, input_shape, mode))
    return given


class Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What tensors meet in arithmetic that is a number in code, as (operation, number)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[str, float]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ARITHMETIC:
            self.found |= {(name, float(number)) for number in args if isinstance(number, int | float)}
        return func(*args, **(kwargs or {}))


def not_finite(model: nn.Module, images: Tensor, which: str) -> CompactError:
    """What is wrong with a network whose outputs for images (n, c, h, w) hold NaN or Inf: where that begins.

    `which` says what images they are.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    inner = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    inner = [(name, module) for name, module in inner if _hookable(module)]
    with ExitStack() as hooks, torch.inference_mode():
        for name, module in inner:
            hooks.enter_context(module.register_forward_hook(look(name)))
        model.eval()(images)
    where = f", from {found[0]} on" if found else ""
    return CompactError(f"the network's outputs for {which} hold NaN or Inf{where}: nothing can be derived from them; retrain it")


@contextmanager
def named_failure(where: str) -> Iterator[None]:
    """Whatever the network's code raises in the block, as one line. Raises CompactError."""
    try:
        yield
    except (CompactError, DataDependentOutputException):
        raise
    except Exception as problem:
        raise CompactError(f"the network does not run {where}: {_first_line(problem)}") from problem


def _image(batch: int, input_shape: Sequence[int], mode: Any) -> Tensor:
    with mode:
        return torch.randn(
            batch, *input_shape, generator=None if isinstance(mode, FakeTensorMode) else torch.Generator().manual_seed(0)
        )


def _shadow(model: nn.Module, *, fake: bool) -> tuple[nn.Module, Any]:
    """A copy of `model`, and the mode to run it in. Its tensors are fake; or else buffers are copied, parameters share values.

    Plain tensor attributes stay real: faked, they would meet code that reads their values.
    """
    if isinstance(model, nn.DataParallel):
        model = model.module
    if not fake:
        own = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in model.parameters()}
        return copied(model, own), nullcontext()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {id(tensor): _fake(tensor, mode) for tensor in [*model.parameters(), *model.buffers()]}
    return copied(model, memo), mode


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of modules that hold results of operations beside their parameters (weight_norm as a hook)."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    results = {id(value): value.detach() for value in held if not value.is_leaf}
    return copy.deepcopy(model, {**results, **(memo or {})})


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake stand-in on the CPU, wherever the tensor is: names of operations differ by device."""
    if tensor.device.type == "cpu":
        return mode.from_tensor(tensor)
    with mode:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def silent() -> Iterator[None]:
    """No log lines from torch: what fails on fake tensors is reported by us, once."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Calls(TorchFunctionMode):
    """The function of torch that runs: its operations no longer say whether a split was a chunk."""

    running: str = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.running = self.running, getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running = before


@contextmanager
def _notes(model: nn.Module, calls: _Calls) -> Iterator[tuple[dict[fx.Node, str], set[fx.Node]]]:
    """Note for every node created inside which module's forward was running; and which nodes a chunk made."""
    owners: dict[fx.Node, str] = {}
    chunks: set[fx.Node] = set()
    stack = [""]
    for name, module in model.named_modules():
        if not _hookable(module) and any(True for _ in module.parameters()):
            raise CompactError(f"{name} is a ScriptModule, whose layers cannot be changed; give the module that it was made of")
    names = {module: name for name, module in model.named_modules() if _hookable(module)}

    # Both hooks return None explicitly: a returned value would replace inputs or outputs.
    def enter(module: nn.Module, _args: Any) -> None:
        stack.append(names[module])

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        stack.pop()

    original = fx.Tracer.create_node

    def create_node(self: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = original(self, *args, **kwargs)
        owners[node] = stack[-1]
        if calls.running == "chunk":
            chunks.add(node)
        return node

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        fx.Tracer.create_node = create_node  # type: ignore[method-assign]
        try:
            yield owners, chunks
        finally:
            fx.Tracer.create_node = original  # type: ignore[method-assign]


def _hookable(module: nn.Module) -> bool:
    """Whether hooks can be put on a module: TorchScript's take none, and what they do belongs to the module around them."""
    return not isinstance(module, torch.jit.ScriptModule)


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:200] if lines else type(problem).__name__


def outputs(output: Any) -> list[Tensor]:
    """Every tensor of a network's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for item in items for tensor in outputs(item)]


def scores(output: Any) -> Tensor:
    """The first tensor of a network's output that holds floating-point numbers: behind it may be auxiliary ones, as while
    torchvision's Inception trains. Raises CompactError if there is none.
    """
    found = next((tensor for tensor in outputs(output) if tensor.is_floating_point()), None)
    if found is None:
        raise CompactError("the network's output has no floating-point tensor, so nothing tells how it changes")
    return found
