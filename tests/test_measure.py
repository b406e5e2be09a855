"""What is counted and measured, against other people's counters and by hand."""

import copy
import itertools
import math

import networks
import numpy as np
import pytest
import torch
from networks import AWKWARD, SHAPE, named, randomise_
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compactcli import architectures, measure
from compactcli.errors import CompactError

# Parameters and MACs of convolutions and linear layers at 224 x 224, as published with torchvision's weights (GFLOPS there
# are these, rounded to 10 million).
PUBLISHED = [
    ("resnet18", 11_689_512, 1.81),
    ("resnet50", 25_557_032, 4.09),
    ("vgg11_bn", 132_868_840, 7.61),
    ("mobilenet_v2", 3_504_872, 0.30),
    ("squeezenet1_1", 1_235_496, 0.35),
    ("densenet121", 7_978_856, 2.83),
    ("efficientnet_b0", 5_288_548, 0.39),
]


@pytest.mark.parametrize(("name", "params", "gigamacs"), PUBLISHED)
def test_published_counts(name, params, gigamacs):
    model = architectures.get(name).build()
    assert measure.params(model) == params
    assert measure.macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gigamacs, abs=0.006)


@pytest.mark.parametrize("name", AWKWARD)
def test_macs_are_half_of_what_torch_counts(name):
    model = AWKWARD[name]()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *SHAPE))
    before = copy.deepcopy(model.state_dict())
    assert 2 * measure.macs(model, SHAPE) == counter.get_total_flops()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_shared_parameters_count_once():
    assert measure.params(AWKWARD["tied_parameter"]()) == sum(
        module.weight.numel() for module in AWKWARD["tied_parameter"]().modules() if hasattr(module, "weight")
    ) - 8 * 8 * 9 + (8 + 8 + 8 + 5 + 5)
    layer = nn.Linear(3, 3, bias=False)
    assert measure.params(nn.Sequential(layer, layer)) == 9


def test_thop_leaves_nothing_behind():
    model = named("cifar:resnet8", width=4).train()
    before = set(model.state_dict())
    assert measure.thop_macs(model, (3, 32, 32)) >= measure.macs(model, (3, 32, 32))
    assert set(model.state_dict()) == before
    assert not any(hasattr(module, "total_ops") for module in model.modules())
    assert model.training


def test_thop_counts_convolutions_and_linear_layers():
    model = nn.Sequential(networks.conv(3, 4, bias=False), nn.Flatten(), nn.Linear(256, 2, bias=False))
    assert measure.thop_macs(model, SHAPE) == measure.macs(model, SHAPE) == 64 * 4 * 27 + 512


class Clock:
    """Time that only networks spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def network(self, name: str, *milliseconds: float) -> nn.Module:
        """Takes so long in turn, and again from the first; an input in channels_last takes half."""
        turns = itertools.cycle(milliseconds)

        def forward(owner: nn.Module, image: Tensor) -> Tensor:
            fast = image.shape[1] > 1 and image.is_contiguous(memory_format=torch.channels_last)
            self.now += next(turns) / 1e3 / (2 if fast else 1)
            self.calls.append(name)
            return image

        return networks.Code(forward)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return clock


def test_networks_are_timed_in_turn(clock):
    """Round after round, each once: a machine that slows down slows all alike."""
    pair = [clock.network("a", 1), clock.network("b", 20)]
    first, second = measure.latency(pair, SHAPE, repeats=4, seconds=0, memory_formats=["contiguous"])
    warm = measure.WARM_UP
    assert clock.calls == ["a"] * warm + ["b"] * warm + ["a", "b"] * 4
    assert (first.runs, second.runs) == (4, 4)
    assert first.median_ms == pytest.approx(1)
    assert second.median_ms == pytest.approx(20)


def test_memory_formats_are_timed_in_turn_and_the_faster_is_chosen(clock):
    (found,) = measure.latency([clock.network("a", 4)], SHAPE, repeats=3, seconds=0)
    assert len(clock.calls) == 2 * (measure.WARM_UP + 3)
    assert (found.memory_format, found.median_ms) == ("channels_last", pytest.approx(2))
    (gray,) = measure.latency([clock.network("a", 4)], (1, 8, 8), repeats=3, seconds=0)
    assert gray.memory_format == "contiguous"  # where there is no difference


def test_median_spread_and_throughput(clock):
    (found,) = measure.latency([clock.network("a", 1, 2, 3, 4, 100)], SHAPE, batch=6, seconds=0, memory_formats=["contiguous"])
    assert found.median_ms == pytest.approx(3)
    assert found.iqr_ms == pytest.approx(2)
    assert found.images_per_second == pytest.approx(2000)
    assert (found.batch, found.runs, found.peak_memory_bytes) == (6, 5, None)


def test_there_are_more_rounds_until_the_time_is_up(clock):
    (found,) = measure.latency([clock.network("a", 10)], SHAPE, repeats=2, seconds=0.995, memory_formats=["contiguous"])
    assert found.runs == 100


def test_one_run_has_no_spread():
    with pytest.raises(CompactError, match="repeats is 1; it must be 2 or more"):
        measure.latency([nn.Identity()], SHAPE, repeats=1)


def test_a_network_that_is_clearly_larger_is_slower():
    small = networks.conv(3, 2, 1)
    large = nn.Sequential(networks.conv(3, 64), networks.conv(64, 64), networks.conv(64, 64))
    for pair in ([small, large], [large, small]):
        found = dict(zip(map(id, pair), measure.latency(pair, (3, 64, 64), seconds=0.1), strict=True))
        assert 0 < found[id(small)].median_ms < found[id(large)].median_ms


def test_timing_leaves_networks_as_they_were():
    """Their mode, their weights, where these lie; buffers are not counted up, and nothing needs a gradient."""
    model = named("cifar:resnet8", width=4).train()
    model.linear.eval()
    modes = [module.training for module in model.modules()]
    before = {name: (t.clone(), t.stride(), t.data_ptr()) for name, t in model.state_dict().items()}
    measure.latency([model, model], (3, 32, 32), batch=2, seconds=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert (tensor.stride(), tensor.data_ptr()) == before[name][1:]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_what_is_timed_is_the_network(memory_format):
    """The copy gives the same scores, in eval mode, and shares what needs no change."""
    model = named("cifar:resnet8", width=4).train()
    timed = measure._laid_out(model, torch.device("cpu"), memory_format)
    image = torch.rand(2, 3, 32, 32)
    assert not any(module.training for module in timed.modules())
    assert timed.layer2[0].conv1.weight.is_contiguous(memory_format=measure.FORMATS[memory_format])
    assert timed.linear.weight.data_ptr() == model.linear.weight.data_ptr()
    assert type(timed.conv1.weight) is nn.Parameter
    assert torch.allclose(timed(image), model.eval()(image), atol=1e-5)


@pytest.mark.parametrize("name", AWKWARD)
def test_every_kind_of_network_can_be_timed(name):
    model = AWKWARD[name]()
    assert measure.latency([model], SHAPE, batch=3, repeats=2, seconds=0)[0].median_ms > 0


def test_threads_are_set_and_put_back():
    seen = []
    before = torch.get_num_threads()
    probe = networks.Code(lambda owner, image: seen.append(torch.get_num_threads()) or image)
    (found,) = measure.latency([probe], SHAPE, threads=before + 1, repeats=2, seconds=0)
    assert (set(seen), found.threads, torch.get_num_threads()) == ({before + 1}, before + 1, before)
    assert measure.latency([probe], SHAPE, repeats=2, seconds=0)[0].threads == before


@pytest.mark.parametrize("when", [1, measure.WARM_UP + 1])
def test_threads_are_put_back_when_a_network_fails(when):
    calls = itertools.count(1)

    def forward(owner: nn.Module, image: Tensor) -> Tensor:
        if next(calls) == when:
            raise ZeroDivisionError
        return image

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        measure.latency([networks.Code(forward)], SHAPE, threads=before + 1, seconds=0, memory_formats=["contiguous"])
    assert torch.get_num_threads() == before


def test_a_batch_that_does_not_run_is_named():
    """One image fits the number in the code, four do not."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), networks.Code(lambda owner, image: image.reshape(1, 128)))
    assert measure.latency([model], SHAPE, repeats=2, seconds=0)[0].batch == 1
    with pytest.raises(CompactError, match=r"does not run on cpu in batches of 4: shape .* invalid.*; try a smaller batch"):
        measure.latency([model], SHAPE, batch=4, seconds=0)
    with pytest.raises(CompactError, match=r"does not run on cpu in batches of 1000000000000: .*; try a smaller batch"):
        measure.latency([model], SHAPE, batch=10**12, seconds=0)


def test_the_processor_has_a_name():
    assert measure.processor("cpu").strip()


def test_peak_memory_is_what_a_run_adds_to_a_networks_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000)  # every network's
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10_700)
    shared = nn.Linear(8, 8, bias=False)
    timed = measure._Run(nn.Sequential(shared, nn.ReLU(), shared), SHAPE, 2, "cpu", "contiguous")
    assert timed._peak_memory() == 700 + 4 * 64 + 4 * 2 * math.prod(SHAPE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_is_a_networks_own():
    """Weights and activations of one network; the other's, which lie there too, are not in it."""
    small, large = networks.conv(3, 2, 1), nn.Sequential(networks.conv(3, 512), networks.conv(512, 512))
    first, second = measure.latency([small, large], SHAPE, device="cuda", seconds=0)
    weights = 4 * measure.params(large)
    assert first.peak_memory_bytes < weights <= second.peak_memory_bytes
    assert {parameter.device.type for parameter in large.parameters()} == {"cpu"}


class Fixed(nn.Module):
    """Gives the scores it is shown: an image of (classes, 1, 1) is its own logits."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1)


def test_accuracy_by_hand():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [9.0, 1, 2, 3, 4, 5, 6], [0.0, 1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([0, 3, 1])  # the best, the fifth, the sixth
    batches = [(logits[:2, :, None, None], labels[:2]), (logits[2:, :, None, None], labels[2:])]
    found = measure.accuracy(Fixed().train(), batches)
    assert found.top1 == pytest.approx(100 / 3)
    assert found.top5 == pytest.approx(200 / 3)
    assert found.images == 3
    loss = sum(
        math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(logits.tolist(), [0, 3, 1], strict=True)
    )
    assert found.loss == pytest.approx(loss / 3, rel=1e-5)


def test_accuracy_of_fewer_than_five_classes():
    found = measure.accuracy(Fixed(), [(torch.tensor([[1.0, 2.0]])[:, :, None, None], torch.tensor([0]))])
    assert (found.top1, found.top5) == (0, 100)


def test_accuracy_of_no_images():
    with pytest.raises(CompactError, match="there are no images to evaluate on"):
        measure.accuracy(Fixed(), [])


# Redundancy

HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])[1:]  # orthogonal, of mean zero


def test_orthogonal_filters_are_not_redundant():
    found = measure.redundancy(HADAMARD.reshape(3, 1, 2, 2))
    assert found.max_abs_corr == pytest.approx(0, abs=1e-12)
    assert found.mean_abs_corr == pytest.approx(0, abs=1e-12)
    assert found.effective_rank == pytest.approx(3)
    assert found.rank_ratio_99 == 1


@pytest.mark.parametrize("factor", [1.0, -2.0, 0.001])
def test_copies_are_redundant(factor):
    """Of any size and sign: a correlation does not see them."""
    weight = torch.randn(1, 8, 3, 3).repeat(5, 1, 1, 1)
    weight[0] *= factor
    found = measure.redundancy(weight)
    assert found.max_abs_corr == pytest.approx(1, abs=1e-6)
    assert found.mean_abs_corr == pytest.approx(1, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-2)
    assert found.rank_ratio_99 == 1 / 5


def test_a_pair_of_copies_among_orthogonal_filters():
    weight = torch.cat([HADAMARD, 3 * HADAMARD[:1]])
    found = measure.redundancy(weight)
    assert found.max_abs_corr == pytest.approx(2 / 4)  # two of four filters have a twin
    assert found.mean_abs_corr == pytest.approx(2 / 12)


def test_the_rank_that_holds_the_energy():
    """Singular values 10, 1, 1, ...: 100 of 102 is less than 99 %, 101 of 102 is more."""
    left, right = torch.linalg.qr(torch.randn(3, 3)).Q, torch.linalg.qr(torch.randn(7, 3)).Q
    found = measure.redundancy(left @ torch.diag(torch.tensor([10.0, 1.0, 1.0])) @ right.T)
    assert found.rank_ratio_99 == pytest.approx(2 / 3)
    share = torch.tensor([10.0, 1.0, 1.0]) / 12
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-4)


@pytest.mark.parametrize("shape", [(20, 3, 1, 1), (3, 20, 1, 1)])
def test_tall_and_wide_weights_give_the_same_rank(shape):
    weight = torch.randn(shape)
    values = torch.linalg.svdvals(weight.flatten(1).double())
    share = values / values.sum()
    assert measure.redundancy(weight).effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


KINDS = [
    (torch.nn.Linear(4, 6), (3, 4)),
    (torch.nn.Conv1d(4, 6, 3), (4, 9)),
    (torch.nn.Conv2d(4, 6, 3), (4, 5, 6)),
    (torch.nn.Conv3d(4, 6, (1, 3, 3)), (4, 2, 5, 6)),
    (torch.nn.ConvTranspose1d(4, 6, 3), (4, 9)),
    (torch.nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 6)),
    (torch.nn.ConvTranspose3d(4, 6, 3), (4, 2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), KINDS, ids=lambda value: type(value).__name__)
def test_activations_are_alike_along_the_channels(layer, shape):
    """Of any number of dimensions: as the correlations of numpy say, of the channels' values."""
    images = torch.randn(8, *shape)
    (found,) = measure.activation_redundancy(torch.nn.Sequential(layer), ["0"], [images]).values()
    with torch.no_grad():
        made = layer(images)
    values = made.movedim(-1 if isinstance(layer, torch.nn.Linear) else 1, 0).flatten(1)
    alike = abs(np.corrcoef(values.double().numpy())) - np.eye(6)
    assert found.max_abs_corr == pytest.approx(alike.max(1).mean(), abs=1e-4)
    assert found.mean_abs_corr == pytest.approx(alike.sum() / 30, abs=1e-4)


def test_what_has_no_redundancy():
    assert measure.redundancy(torch.randn(1, 4, 3, 3)) is None
    assert measure.redundancy(torch.full((3, 4), float("nan"))) is None
    assert measure.redundancy(torch.tensor([[1.0, float("inf")], [1.0, 2.0]])) is None
    assert measure.redundancy(torch.zeros(3, 4)) == measure.Redundancy(0.0, 0.0, 0.0, 0.0)


def test_a_network_of_convolutions_only():
    assert measure.macs(randomise_(networks.convolution_as_classifier()), SHAPE) == 64 * 8 * 27 + 64 * 8 * 5
