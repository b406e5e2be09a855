"""Networks for those who do not have this package: ONNX, torch.export, plain weights, timm.

A network is laid out in plain layers, written, read back and run; only if it then computes what it did before is
there anything to hand out.
"""

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import __version__, architectures, artefact, folding, kernels, law, measure
from .artefact import Network
from .errors import CompactError, shape_text
from .graph import BATCH, copied, not_finite, outputs, silent
from .precision import uncast_
from .recipe import Measures, Step, without_tensors

TOLERANCE = 1e-4  # of the largest output: single precision, whose sums other libraries take in another order
BATCHES = (1, 3)  # of the images on which outputs are compared; traced with another number
TARGETS = ("onnx", "pt2", "weights", "timm")
FACTS = "compactcli.json"  # the extra file of a pt2 that says what its input is
INPUT, OUTPUT = "input", "logits"
ANY_BATCH = ({0: torch.export.Dim("batch")},)
EXTRA = ("onnx", "onnxscript", "onnxruntime")
PICKLED = (".pth", ".pt", ".th", ".bin", ".ckpt")  # endings of files that torch.load is to read

Log = Callable[[str], None]
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What a file is to hold, and how far the outputs of what it says are from the network's."""

    data: bytes
    difference: float  # the largest, relative to the largest output


def check_extra(to: str) -> None:
    """Raise CompactError if a target needs libraries that are not installed."""
    missing = [name for name in EXTRA if to == "onnx" and find_spec(name) is None]
    if missing:
        raise CompactError(f'--to onnx needs {" and ".join(missing)}; pip install "compactcli[onnx]"')
    if to == "timm" and not architectures.has_timm():
        raise CompactError('--to timm needs timm; pip install "compactcli[timm]"')


def export(
    network: Network,
    to: str,
    *,
    fold_bn: bool = False,
    ending: str = "",
    arch: str | None = None,
    log: Log = lambda line: None,
) -> Exported:
    """What a file for one of TARGETS holds; the network stays as it is.

    `ending` is the file's (".pth": weights for torch.load instead of safetensors), `arch` the user's own factory, where that
    built the network. Raises CompactError if the network cannot be written so, or computes something else when read back.
    """
    check_extra(to)
    artefact.check_finite(network)
    images = [_images(batch, network.input_shape) for batch in BATCHES]
    expected = [_run(network.module, image) for image in images]
    if not all(output.isfinite().all() for outputs in expected for output in outputs):
        raise not_finite(network.module, images[0], "random images")
    module = copied(network.module).eval().requires_grad_(False)
    kernels.fold_(module, dense=_DENSE[to])
    if fold_bn:
        _fold_bn_(module, network.input_shape, log)
    _zero_subnormals_(module, log)
    result = _WRITERS[to](_Job(network, module, ending, arch, log))
    difference = max(law.difference(result.run(image), wanted) for image, wanted in zip(images, expected, strict=True))
    told = f"at batch {' and '.join(map(str, BATCHES))} by up to {difference:.1e} of the largest output"
    if not difference <= TOLERANCE:
        raise CompactError(
            f"{network.name}: outputs of {result.what} differ {told}, {TOLERANCE:.0e} is allowed; nothing was written, "
            "please report this"
        )
    log(f"{result.what}: outputs differ {told}; {TOLERANCE:.0e} is allowed")
    return Exported(result.data, difference)


def simplify_(network: Network, *, fold_bn: bool, log: Log = lambda line: None) -> Network:
    """Zero subnormal numbers in place and, if `fold_bn`, fold batch norms, which is a step of the history; the same network.

    Raises CompactError if a weight or an output is not finite, or an output changes by more than float64 rounds.
    """
    artefact.check_finite(network)
    _zero_subnormals_(network.module, log)
    if fold_bn:
        uncast_(network, log)
        shape, before = network.input_shape, measure.probed(network.module, network.input_shape, finite=True)
        edits = without_tensors(_fold_bn_(network.module, shape, log))
        error = measure.relative_change(measure.probed(network.module, shape), before)
        measures = Measures(measure.params(network.module), measure.macs(network.module, shape))
        network.recipe = network.recipe.then(Step("export", None, {"fold_bn": True}, edits, measures, error, __version__))
    return network


def facts(network: Network) -> dict[str, Any]:
    """What whoever runs the network must know: what its input is made of, and what its outputs mean."""
    recipe, pre = network.recipe, network.recipe.preprocessing
    found = {
        "architecture": recipe.architecture,
        "input_shape": list(recipe.input_shape),
        "mean": list(pre.mean),
        "std": list(pre.std),
        "resize": pre.resize,
        "interpolation": pre.interpolation,
        "classes": None if recipe.classes is None else list(recipe.classes),
    }
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class _Job:
    """A network, and what is written of it: a copy in plain layers."""

    network: Network
    module: nn.Module
    ending: str
    arch: str | None
    log: Log


@dataclass(frozen=True)
class _Result:
    """What was written, and the network that was read back from it."""

    what: str
    data: bytes
    run: Run


def _fold_bn_(module: nn.Module, input_shape: tuple[int, ...], log: Log) -> list[Any]:
    norms = folding.norms(module)
    edits = folding.fold_(module, input_shape)
    left = "; the others follow no plain layer whose only reader they are" if len(edits) < 2 * norms else ""
    log(f"folded {len(edits) // 2} of {norms} batch norms{left}")
    return edits


def _zero_subnormals_(module: nn.Module, log: Log) -> None:
    """Put zero for numbers so small that processors take many times longer over them."""
    count = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            small = (tensor.detach() != 0) & (tensor.detach().abs() < torch.finfo(tensor.dtype).tiny)
            if small.any():
                count += int(small.sum())
                tensor.data.masked_fill_(small, 0)
    if count:
        log(f"zeroed {count:,} subnormal numbers, which slow CPUs down")


def _images(batch: int, input_shape: Sequence[int]) -> Tensor:
    return torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(batch))


def _run(module: Callable[[Tensor], Any], image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return outputs(module(image.clone()))  # which the network may write into


@contextlib.contextmanager
def _by(what: str, network: Network) -> Iterator[None]:
    """A library's work: nothing of it on stdout or in the log, its failure in one line. Raises CompactError."""
    try:
        with silent(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as problem:  # of whatever type a tracer has for what it does not know
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise CompactError(f"{network.name}: {what} cannot take this network: {lines[0][:200]}; try another --to") from problem


def _traced(job: _Job) -> torch.export.ExportedProgram:
    """The network as torch.export sees it, for any number of images; it holds nothing of this machine."""
    forward = job.module.forward

    def named(input: Tensor) -> Any:
        found = outputs(forward(input))
        return found[0] if len(found) == 1 else tuple(found)

    job.module.forward = named
    image = _images(BATCH, job.network.input_shape)
    try:
        program = torch.export.export(job.module, (image,), dynamic_shapes=ANY_BATCH)
    finally:
        del job.module.forward
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files
    return program


def _pt2(job: _Job) -> _Result:
    with _by("torch.export", job.network):
        program = _traced(job)
        program.example_inputs = None
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={FACTS: json.dumps(facts(job.network))})
        file.seek(0)
        loaded = torch.export.load(file).module()
    return _Result("torch.export", file.getvalue(), lambda image: _run(loaded, image))


def _onnx(job: _Job) -> _Result:
    with _by("torch.onnx", job.network):
        program = _traced(job)
        count = len(program.graph_signature.user_outputs)
        names = [OUTPUT, *(f"{OUTPUT}_{index}" for index in range(1, count))]
        exported: Any = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=names,
            dynamic_shapes=ANY_BATCH,  # the name of the axis
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        model = exported.model_proto
        for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
            node.ClearField("metadata_props")  # names files
            node.ClearField("doc_string")
        for key, value in facts(job.network).items():
            model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
        import_module("onnx.checker").check_model(model, full_check=True)
        data = model.SerializeToString(deterministic=True)
        session = onnx_session(data)
    return _Result("ONNX Runtime", data, lambda image: _run_onnx(session, image))


def onnx_session(data: bytes) -> Any:
    """An ONNX model in ONNX Runtime on the CPU, with as many threads as torch has."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _run_onnx(session: Any, image: Tensor) -> list[Tensor]:
    return [torch.from_numpy(output) for output in session.run(None, {INPUT: image.numpy()})]


def _weights(job: _Job) -> _Result:
    own = artefact.first_architecture(job.network.recipe, job.arch).build()
    _check_same_layers(job, own, f"a plain {job.network.recipe.architecture}")
    data = _state_bytes(job.module.state_dict(), job.ending)
    own.load_state_dict(_read_state(data, job.ending))
    own.eval()
    return _Result("plain weights", data, lambda image: _run(own, image))


def _timm(job: _Job) -> _Result:
    recipe = job.network.recipe
    library, _, name = recipe.architecture.rpartition(":")
    kwargs = dict(recipe.kwargs)
    timm = architectures.timm()
    if library not in ("", "timm") or not timm.is_model(name) or (not library and set(kwargs) - {"num_classes"}):
        raise CompactError(f"{job.network.name}: timm has no {recipe.architecture}; use --to onnx or --to pt2")
    if not library:
        kwargs.setdefault("num_classes", job.network.num_classes)
    _check_same_layers(job, timm.create_model(name, **kwargs), f"timm's {name}")
    ending = job.ending if job.ending in PICKLED else ".safetensors"
    data = _state_bytes(job.module.state_dict(), ending)
    with tempfile.TemporaryDirectory() as folder, _by("timm", job.network):
        path = Path(folder, f"model{ending}")
        path.write_bytes(data)
        own = timm.create_model(name, checkpoint_path=str(path), **kwargs).eval()
    told = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    job.log(f'timm.create_model("{name}"{told}, checkpoint_path=FILE) loads it')
    return _Result("timm's network", data, lambda image: _run(own, image))


def _check_same_layers(job: _Job, other: nn.Module, what: str) -> None:
    """Raise CompactError unless the weights are those that another network has."""
    own, wanted = ({name: tensor.shape for name, tensor in each.state_dict().items()} for each in (job.module, other))
    name = next((name for name in [*own, *wanted] if own.get(name) != wanted.get(name)), None)
    if name is not None:
        here, there = (shape_text(each[name]) if name in each else "not there" for each in (own, wanted))
        raise CompactError(
            f"{job.network.name}: weights alone do not say what this network is: {name} is {here}, in {what} {there}; "
            "use --to onnx or --to pt2, which need no code"
        )


def _state_bytes(state: Mapping[str, Tensor], ending: str) -> bytes:
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    if ending not in PICKLED:
        return safetensors.torch.save(tensors, {"format": "pt"})
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def _read_state(data: bytes, ending: str) -> dict[str, Tensor]:
    if ending not in PICKLED:
        return safetensors.torch.load(data)
    state: dict[str, Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    return state


# ONNX Runtime computes groups that do not fill the vectors of a CPU without its fast kernels, in several times as long.
_DENSE: dict[str, kernels.Dense] = {"onnx": "narrow", "pt2": "never", "weights": "always", "timm": "always"}
_WRITERS: dict[str, Callable[[_Job], _Result]] = {"onnx": _onnx, "pt2": _pt2, "weights": _weights, "timm": _timm}
