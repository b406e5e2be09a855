"""The laws in networks of people who write their own: what each is odd by, its name says."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, randomise_, removable
from test_compress import own
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from compactcli import channels, kernels, law, measure, methods, report
from compactcli.compress import Calibration, Target, compress
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.layers import layers, macs
from compactcli.plain import plain_
from compactcli.plan import plan


class Places(nn.Module):
    """SegNet: a pooling's places are where an unpooling puts the channels that come back."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner, self.up = (nn.Conv2d(*sides, 3, padding=1) for sides in ((3, 8), (8, 12), (12, 8)))
        self.pool, self.unpool, self.head = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.pool(F.relu(self.down(x)))
        return self.head(self.unpool(F.relu(self.up(F.relu(self.inner(x)))), places))


class Constant(nn.Module):
    """A kernel of the user's own that is not learnt: a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.register_buffer("blur", torch.randn(8, 1, 3, 3))
        self.register_buffer("mix", torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.relu(self.conv(x)), self.mix)
        return self.head(F.conv2d(x, self.blur, groups=8, padding=1).mean((2, 3)))


class Hidden(nn.Module):
    """Layers between convolutions whose weights are computed."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = wrap(nn.Conv2d(3, 8, 3)), wrap(nn.Conv2d(8, 8, 3))
        self.hidden, self.head = wrap(nn.Linear(8, 12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))))


class Property(nn.Module):
    """A number of channels that is computed where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    @property
    def width(self) -> int:
        return 4

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(F.relu(self.conv(x)), [self.width, self.width], 1)
        return self.head(self.left(left) + self.right(right))


class Counts(nn.Module):
    """Its code reckons with how many channels there are, here of one layer, there of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x) * x.shape[1] ** -0.5)
        return self.head(F.relu(self.third(x)) / x.shape[1])


class Alike(nn.Module):
    """Its features multiplied with themselves, image by image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.deep(F.relu(self.conv(x)))).mean((2, 3))
        return self.head(y), y @ y.t()


class Bits(nn.Module):
    """An output that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(F.relu(self.conv(x)))
        return {"scores": y.mean((2, 3)), "mask": y > 0}


class Adapted(nn.Linear):
    """A low-rank adapter in a layer: one module with three weights."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class InPlace(nn.Module):
    """A detector's head, which writes into what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(F.relu(self.deep(F.relu(self.conv(x))))).sigmoid()
        y[:, 0:2] = y[:, 0:2] * 2 - 0.5
        y[:, 2:4] = (y[:, 2:4] * 2) ** 2
        return y


class Depends(nn.Module):
    """Code that asks for the values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.conv(x))
        return self.head((x * 2 if x.mean() > 1e6 else x).mean((2, 3)))


class Random(nn.Module):
    """Dropout that is never turned off, on what is not cut; before it, where asked for, a tensor made of a number of channels."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.deep, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = x * torch.tensor(x.shape[1] ** -0.5) if self.scaled else x
        return F.dropout(self.head(F.relu(self.deep(x)).mean((2, 3))))


ODD: dict[str, Callable[[], nn.Module]] = {
    "places": Places,
    "constant": Constant,
    "weight norm": lambda: Hidden(parametrizations.weight_norm),
    "old weight norm": lambda: Hidden(weight_norm),
    "pruned": lambda: Hidden(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "property": Property,
    "alike": Alike,
    "bits": Bits,
    "adapted": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Adapted(8, 12, 4), nn.ReLU(), Adapted(12, 3, 2)
    ),
    "in place": InPlace,
    "counts": Counts,
    "depends": Depends,
    "random": lambda: Random(scaled=False),
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    ),
}


def odd(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, on the old way to normalise weights
        return randomise_(ODD[name]()).eval()


@pytest.mark.parametrize("name", ODD)
def test_cut_equals_mask(name):
    module = odd(name)
    plain_(module, SHAPE)
    _, sets = plan(module, SHAPE)
    gone = removable(sets, 0.4)
    assert len(gone)
    law.apply_checked_(module, channels.edits(sets, gone, module), sets.consumed, SHAPE)


REASONS = ("this method", "could make nothing here smaller", "there are no", "depends on the values")


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("name", ODD)
def test_every_method_makes_it_smaller_or_says_in_a_line_why_not(name, method, images):
    """Nothing but what it says of itself, whatever it is given."""
    given = own(odd(name))
    calibration = Calibration(torch.randint(0, 256, (16, *SHAPE), dtype=torch.uint8), "noise") if images else None
    before = measure.params(given.module), measure.macs(given.module, SHAPE)
    said = ""
    try:
        compress(given, method, methods.get(method)(), Target(0.8, nearest=True), calibration=calibration)
    except CompactError as problem:
        said = str(problem)
    after = measure.params(given.module), measure.macs(given.module, SHAPE)
    smaller = any(now < was for now, was in zip(after, before, strict=True))
    assert smaller or any(reason in said for reason in REASONS), said


@pytest.mark.parametrize("name", ODD)
def test_multiply_accumulates_are_those_of_its_operations(name):
    module = odd(name)
    assert measure.macs(module, SHAPE) == pytest.approx(macs(trace(module, SHAPE)), abs=16 if name == "alike" else 0)


@pytest.mark.parametrize("name", ODD)
def test_a_reports_rows_add_up(name):
    given = own(odd(name))
    rows = report._layers(given)
    graph = trace(kernels.folded(given.module), SHAPE)
    assert sum(row["macs"] for row in rows) == sum(layer.macs for layer in layers(graph))
    assert all(row["before"] == row["after"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    assert sum(row["params"] for row in rows) <= measure.params(given.module)


def test_attention_that_projects_by_one_matrix_has_rows_of_its_own():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).flatten(2).transpose(1, 2)
            return self.attention(x, x, x)[0].mean(1)

    rows = {row["name"]: row["params"] for row in report._layers(own(randomise_(Attends())))}
    assert rows == {"conv": 8 * 27 + 8, "attention": 24 * 8 + 24, "attention.out_proj": 8 * 8 + 8}


def test_a_network_that_is_random_is_held_to_the_law():
    """Noise is no rounding: behind dropout that is never turned off, what breaks the law is found as it is without."""
    with pytest.raises(CompactError, match="the smaller network differs from the masked one"):
        compress(own(randomise_(Random(scaled=True))), "hinge", methods.get("hinge")(), Target(0.6))


def test_channels_that_code_counts_are_locked_and_the_others_go():
    lines: list[str] = []
    _, sets = plan(odd("counts"), SHAPE, lines.append)
    told = {name: sets.reason((f"{name}.weight", 0)) for name in ("first", "second", "third")}
    assert told == {
        "first": "its number is written in code: with fewer channels its code would multiply by 0.377964",
        "second": "its number is written in code: with fewer channels its code would divide by 5",
        "third": None,
    }
    assert len(lines) == 2
