"""One network and one tool, measured in a process of its own: `python -m benchmarks._coverage_worker TOOL NETWORK`.

Prints the row as one line of JSON after every stage, so that what was found before a crash is kept: the last line counts.
"""

import json
import math
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from compactcli import architectures, artefact, channels, detection, measure
from compactcli.architectures import Architecture
from compactcli.budget import Budget
from compactcli.channels import Channels
from compactcli.compress import Target, compress
from compactcli.graph import Graph, outputs, run_fake
from compactcli.law import TOLERANCE, apply_checked_, difference, run_double
from compactcli.layers import Layer, layers
from compactcli.methods import get
from compactcli.plain import plain_
from compactcli.plan import plan
from compactcli.recipe import Recipe
from compactcli.vision import torchvision

MEMORY = 12 << 30  # bytes of data that one process may hold
GIANTS = ("vit_h_14", "regnet_y_128gf")  # more than 600 million parameters: recognised and analysed, not computed
SHARE = 0.3  # of what may be removed
SEGMENTATION = (
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
)

Found = dict[str, Any]


def main(tool: str, name: str) -> None:
    """Measure one network with one tool ("ours" or "peer")."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    row = Row()
    if tool == "ours":
        ours(row, name)
    else:
        from ._coverage_peer import peer

        peer(row, name)
    row.say({"finished": True})


class Row:
    """What has been found so far. Standard output carries nothing else."""

    def __init__(self) -> None:
        self.found: Found = {}
        self.out, sys.stdout = sys.stdout, sys.stderr

    def say(self, found: Found) -> None:
        self.found.update(found)
        print(json.dumps(self.found), file=self.out, flush=True)

    def stage(self, name: str, function: Callable[[], Found]) -> bool:
        """Run one stage; note what it found, or its error, and what it took. Whether it went through."""
        self.say({"running": name})
        _forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            found = function()
        except Exception as problem:
            found = {"error": brief(problem)}
        found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "peak_mb": _peak()}
        self.found.pop("running")
        self.say({name: found})
        return "error" not in found


def brief(problem: BaseException) -> str:
    """The first line of an error."""
    return f"{type(problem).__name__}: {next(iter(str(problem).strip().splitlines()), '')}"[:300]


def _forget_peak() -> None:
    with suppress(OSError):  # then the peak is that of all stages so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The largest resident memory since the last `_forget_peak`, in MB."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if kilobytes is None else kilobytes) // 1024


# The networks


def architecture(name: str) -> Architecture:
    """A network by the name that this benchmark gives it."""
    if name not in SEGMENTATION:
        return architectures.get(name)
    models = torchvision().models.segmentation

    def build() -> nn.Module:
        return getattr(models, name)(weights=None, weights_backbone=None)

    return Architecture(name, {}, (3, 224, 224), architectures.IMAGENET, build)


def randomised(name: str, seed: int = 0) -> nn.Module:
    """The network with every parameter and running statistic drawn anew: none zero, none one, so that no error hides."""
    model = architecture(name).build()
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for tensor in model.parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 1.5)
            if isinstance(module, _NormBase) and module.weight is not None:
                uniform(module.weight, 0.4, 1.4)
    return model.eval()


def shares(graph: Graph, counted: Callable[[Layer], tuple[int, int]]) -> Found:
    """Output channels and how many of them are free: of 2-D convolutions, and of linear layers."""
    found = Counter({"channels": 0, "free": 0, "linear_channels": 0, "linear_free": 0})
    for layer in layers(graph):
        kind = {4: "", 2: "linear_"}.get(len(layer.shape))
        if kind is not None:
            width, free = counted(layer)
            found.update({f"{kind}channels": width, f"{kind}free": free})
    return dict(found)


def law(model: nn.Module, image: Tensor, error: float) -> Found:
    """The error beside the noise floor, where it is above the tolerance."""
    if error <= TOLERANCE:
        return {"law": error}
    expected = run_double(model, image)
    return {"law": error, "noise": difference(run_double(model, image * (1 + 1e-15)), expected)}


def train_step(model: nn.Module, shape: Sequence[int]) -> Found:
    """One step of SGD on two images, on the cross-entropy of every output, heads for training among them."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = outputs(model(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))))
    loss = sum(nn.functional.cross_entropy(o, torch.zeros(2, *o.shape[2:], dtype=torch.long)) for o in found)
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()
    if not loss.isfinite():
        raise ArithmeticError(f"the loss is {float(loss)}")
    return {"loss": float(loss), "outputs": len(found)}


# Ours


def ours(row: Row, name: str) -> None:
    """Every stage of compactcli, on one network."""
    giant = name in GIANTS
    model = architecture(name).build(device="meta").eval() if giant else randomised(name)
    shape = architecture(name).input_shape
    row.say({"params": measure.params(model), "bytes": 4 * measure.params(model), "shape": shape})
    if name not in SEGMENTATION:
        row.stage("bare", lambda: _detected(model) if giant else _bare(model, shape))
    analysed: list[tuple[Graph, Channels]] = []

    def analyse() -> Found:
        made_plain = plain_(model, shape)
        analysed.append(plan(model, shape))
        return {"made_plain": len(made_plain)}

    if not row.stage("analysis", analyse):
        return
    graph, sets = analysed[0]
    row.stage("free", lambda: _free(graph, sets))
    if giant:
        return
    removed = _removable(sets, SHARE)
    predicted = _predicted(graph, sets, model, removed)
    if row.stage("surgery", lambda: _cut(model, sets, removed, shape)):
        row.stage("cost", lambda: _cost(model, shape, predicted))
        row.stage("train", lambda: train_step(model, shape))
    model.to("meta")  # frees its memory
    row.stage("compress", lambda: _compressed(name))


def _detected(model: nn.Module) -> Found:
    """What the keys and shapes are recognised as; that it runs, without numbers."""
    recognised = detection.detect(model.state_dict()).architecture
    run_fake(recognised.build(device="meta"), recognised.input_shape)
    return {"name": recognised.name, "equal": None}


def _bare(model: nn.Module, shape: Sequence[int]) -> Found:
    """What a plain file of weights is recognised as, and whether that computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bare.safetensors"
        safetensors.torch.save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, path)
        network = artefact.open_model(path)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        error = difference(outputs(network.module(image)), outputs(model(image)))
    return {"name": network.recipe.architecture, "equal": error < 1e-5}


def _free(graph: Graph, sets: Channels) -> Found:
    """How many of the layers' output channels may go, and why those of convolutions may not."""
    locks: Counter[str] = Counter()

    def counted(layer: Layer) -> tuple[int, int]:
        numbers = sets.axes[layer.weight, layer.out_axis].tolist()
        reasons = [sets.locked[number][:120] for number in numbers if number in sets.locked]
        if len(layer.shape) == 4:
            locks.update(reasons)
        return len(numbers), len(numbers) - len(reasons)

    return {**shares(graph, counted), "locks": dict(locks.most_common())}


def _removable(sets: Channels, share: float) -> list[int]:
    """About that share of the free sets, at random, such that something is left along every axis."""
    lies_on: dict[int, Counter[tuple[str, int]]] = defaultdict(Counter)
    left: Counter[tuple[str, int]] = Counter()
    for axis, numbers in sets.axes.items():
        left[axis] = len(numbers)
        for number in numbers.tolist():
            lies_on[number][axis] += 1
    free = np.random.default_rng(0).permutation(sets.free()).tolist()
    removed = []
    for number in free[: round(share * len(free))]:
        if all(left[axis] > count for axis, count in lies_on[number].items()):
            left.subtract(lies_on[number])
            removed.append(number)
    return removed


def _cut(model: nn.Module, sets: Channels, removed: list[int], shape: Sequence[int]) -> Found:
    edits = channels.edits(sets, removed, model)
    error = apply_checked_(model, edits, sets.consumed, shape)
    image = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"removed": len(removed), "of": len(sets.free()), **law(model, image, error)}


def _predicted(graph: Graph, sets: Channels, model: nn.Module, removed: list[int]) -> dict[str, int]:
    """The budget's MACs and parameters of the network without the sets."""
    gone = np.zeros(sets.count, dtype=bool)
    gone[removed] = True
    along = np.array([*(np.count_nonzero(~gone[numbers]) for numbers in sets.axes.values()), 1], dtype=float)
    budgets = {of: Budget(graph, sets, model, ratio=0.5, of=of) for of in ("macs", "params")}
    return {of: round(float(budget.cost(along, budget.ranks()))) for of, budget in budgets.items()}


def _cost(model: nn.Module, shape: Sequence[int], predicted: dict[str, int]) -> Found:
    """What the cut network costs beside what the budget said it would."""
    real = {"macs": measure.macs(model, shape), "params": measure.params(model)}
    return {of: {"predicted": predicted[of], "measured": real[of], "equal": predicted[of] == real[of]} for of in real}


def _compressed(name: str) -> Found:
    """The share of parameters kept by the real `compress` that was asked for one half."""
    own = architecture(name)
    module = own.build(initialise=True).eval()
    network = artefact.Network(module, Recipe(own.name, dict(own.kwargs), own.input_shape, own.preprocessing), name)
    before = measure.params(module)
    compress(network, "hinge", get("hinge")(), Target(0.5, of="params"))
    return {"kept": measure.params(network.module) / before}


if __name__ == "__main__":
    main(*sys.argv[1:])
