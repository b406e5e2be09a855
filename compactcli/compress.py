"""The driver of a compression: plan, edit under the law, measure, and one `Step` in the recipe."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import __version__, artefact, measure, surgery
from .artefact import Network
from .budget import Budget, Of
from .channels import find
from .errors import CompactError, UsageError
from .graph import trace
from .methods import Method
from .recipe import Measures, Step, without_tensors

PROBES = 8  # random images on which the error of a step is measured where there are no real ones


@dataclass(frozen=True)
class Target:
    """How small the network shall be. Raises UsageError for a share that is none."""

    ratio: float  # share kept of the network that was read
    of: Of | None = None  # None: what the method is for
    round_to: int | None = None  # channel counts and ranks are multiples of it; None: 1 below width 64, else 8
    nearest: bool = False  # take the nearest reachable ratio instead of failing

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"--ratio {self.ratio:g}: it is the share to keep, between 0 and 1")
        if self.round_to is not None and self.round_to < 1:
            raise UsageError(f"--round {self.round_to}: it is 1 or more")


def compress(
    network: Network, name: str, method: Method, target: Target, *, log: Callable[[str], None] = lambda line: None
) -> Network:
    """Change the network in place with a method, from its weights alone; the same network, one step on.

    Raises CompactError if a weight is not finite, the target is out of reach or the law is broken.
    """
    weights, _ = artefact.nonfinite(network.module)
    if weights:
        raise CompactError(
            f"{network.name}: {weights[0]} holds NaN or Inf, so nothing can be derived from it; retrain or repair the network"
        )
    of: Of = target.of or method.of[0]
    if of not in method.of:
        raise UsageError(f"--of {of}: {name} stores less and computes the same; use --of {method.of[0]}")
    module, shape = network.module, network.input_shape
    probe = torch.randn(PROBES, *shape, generator=torch.Generator().manual_seed(0))
    before = _output(module, probe)

    graph = trace(module, shape)
    channels = find(graph, module)
    budget = Budget(graph, channels, module, ratio=target.ratio, of=of, round_to=target.round_to, nearest=target.nearest)
    edits = method.finish(module, channels, budget, None)
    surgery.apply_checked_(module, edits, channels.consumed, shape)

    error = float((_output(module, probe) - before).norm() / before.norm())
    params, macs = measure.params(module), measure.macs(module, shape)
    kept = (macs if of == "macs" else params) / budget.original
    log(f"{name}: {100 * kept:.1f} % of {of} kept, output error {error:.3f} on random images")
    options = {"ratio": target.ratio, "of": of, "round": target.round_to, **asdict(method.options)}
    step = Step("compress", name, options, without_tensors(edits), Measures(params, macs), error, __version__)
    network.recipe = network.recipe.then(step)
    return network


def _output(module: torch.nn.Module, images: Tensor) -> Tensor:
    """The first output in eval mode, (n, ...)."""
    with torch.inference_mode():
        return surgery.outputs(module.eval()(images))[0]
