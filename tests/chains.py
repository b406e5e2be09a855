"""A random small network and a random chain of edits for every number, and the law that each of them is held to."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import networks
import torch
from torch import Tensor

from compactcli import __version__, artefact, channels, kernels, measure
from compactcli.artefact import Network, Wishes
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.law import apply_checked_
from compactcli.methods import get, names
from compactcli.plain import plain_
from compactcli.recipe import Measures, Step, without_tensors

LAW = 1e-9  # of the largest output, in float64
ROUNDING = 1e-3  # of the largest output, in float32: kernels made beforehand beside those that are made anew


@dataclass(frozen=True)
class Told:
    """What became of one network: the steps that it went through, and why others were refused."""

    steps: tuple[str, ...]
    refused: tuple[str, ...]


def held(number: int) -> Told:
    """Build network `number`, change it, and hold every step and the file in the end to the law.

    A cut must equal the network in which what reads the removed channels has zeros there; a method's step is checked so as it
    is made. The file must give the same network, to the last bit of its outputs, and be the same bytes when written again.
    """
    chance = random.Random(number)
    wishes = wished(chance)
    network = artefact.fresh(wishes, number)
    networks.randomise_(network.module, number)
    steps: list[str] = []
    refused: list[str] = []
    for _ in range(chance.choice((1, 1, 2, 2, 3))):
        name = chance.choice(("cut", "cut", *names()))
        before = copy.deepcopy(network)
        try:
            if name == "cut":
                _cut_(network, chance.uniform(0.1, 0.9), chance.randrange(1000))
            else:
                method = get(name)
                compress(network, name, method(), Target(chance.uniform(0.4, 0.95), nearest=chance.random() < 0.8))
            steps.append(name)
        except CompactError as problem:
            refused.append(f"{name}: {problem}")
            network = before
    assert not [line for line in refused if "\n" in line or "please report" in line]
    _same_from_its_file(network, wishes)
    return Told(tuple(steps), tuple(refused))


def wished(chance: random.Random) -> Wishes:
    """The factory of a random network and its arguments."""
    blocks = [[chance.randrange(len(networks.BLOCKS)), chance.randrange(42)] for _ in range(chance.choice((1, 2, 3, 4, 5)))]
    return Wishes("networks:random_network", {"numbers": blocks, "flat": chance.random() < 0.4}, networks.SHAPE)


def _cut_(network: Network, share: float, seed: int) -> None:
    """Remove about that share of what is free, of plain layers, which every command makes first."""
    module, shape = network.module, network.input_shape
    plain = plain_(module, shape)
    found = channels.find(trace(module, shape), module)
    edits = channels.edits(found, networks.removable(found, share, seed), module)
    image = _image(shape, torch.float64)
    expected = networks.outputs(networks.masked(module, edits), image)
    error = apply_checked_(module, edits, found.consumed, shape)
    actual = networks.outputs(copy.deepcopy(module).double(), image)
    assert _difference(actual, expected) < LAW
    measures = Measures(measure.params(module), measure.macs(module, shape))
    network.recipe = network.recipe.then(
        Step("compress", "hinge", {}, without_tensors([*plain, *edits]), measures, error, __version__)
    )


def _same_from_its_file(network: Network, wishes: Wishes) -> None:
    content = artefact.dumps(network)
    again = artefact.open_model(content, Wishes(wishes.arch))
    image = _image(network.input_shape, torch.float32)
    pairs = zip(networks.outputs(network.module, image), networks.outputs(again.module, image), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert artefact.dumps(again) == content
    plain = kernels.folded(again.module, dense="always")
    assert _difference(networks.outputs(plain, image), networks.outputs(again.module, image)) < ROUNDING


def _image(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value of each output."""
    assert [each.shape for each in actual] == [each.shape for each in expected]
    return max(float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) for a, e in zip(actual, expected, strict=True))
