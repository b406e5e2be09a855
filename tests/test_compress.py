"""The drivers: plan, edit under the law, measure, one step; and training on, with a teacher, one step more."""

import copy
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import networks
import pytest
import torch
from networks import AWKWARD, CLASSES, SHAPE, masked, named, outputs, randomise_
from test_artefact import network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from compactcli import __version__, architectures, artefact, data, dials, measure, sources, surgery, train
from compactcli import compress as driver
from compactcli.artefact import Network, Wishes, open_model
from compactcli.budget import Budget
from compactcli.compress import Target, compress
from compactcli.errors import CompactError, UsageError
from compactcli.finetune import find_teacher, finetune
from compactcli.history import Watch
from compactcli.methods import get
from compactcli.recipe import Keep, Preprocessing, Recipe, Replace, Source

Hinge = get("hinge")


def hinge(mode: str = "auto") -> object:
    return Hinge(Hinge.Options(mode=mode))


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def own(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> Network:
    """A network of nobody's architecture, as a command holds it."""
    return Network(module.eval(), Recipe("own.py:make", {}, shape, Preprocessing((0.5,) * 3, (1.0,) * 3)), "own")


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_share_kept_is_the_one_asked_for(ratio, of):
    given = network(width=16)
    count = {"macs": lambda m: macs(m, (3, 32, 32)), "params": lambda m: sum(p.numel() for p in m.parameters())}[of]
    before = count(given.module)
    assert ratio - 0.02 < count(compress(given, "hinge", hinge(), Target(ratio, of)).module) / before <= ratio


class Encoder(nn.Module):
    """Tokens of patches through torch's own encoder layers, which read their layers' weights themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(self.patches(image).flatten(2).transpose(1, 2))
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("ratio", [0.8, 0.6])
@pytest.mark.parametrize("method", ["hinge", "fcf"])
def test_layers_of_torchs_encoder_stay_layers(method, ratio):
    """Two layers in the place of one would have no weight to read; what lies between two of them may go."""
    one = compress(own(randomise_(Encoder()), (3, 24, 32)), method, get(method)(get(method).Options()), Target(ratio))
    image = torch.randn(2, 3, 24, 32)
    with torch.inference_mode():
        assert one.module(image).shape == (2, 10)
    assert all(isinstance(layer.linear1, nn.Linear) for layer in one.module.encoder.layers)


def test_one_step_is_recorded():
    given = network(width=8)
    image = torch.randn(measure.PROBES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = outputs(given.module, image)[0]
    lines: list[str] = []
    small = compress(given, "hinge", hinge("prune"), Target(0.5, round_to=2), log=lines.append)
    (step,) = small.recipe.steps
    assert (step.command, step.method, step.version) == ("compress", "hinge", __version__)
    assert step.options.items() >= {"ratio": 0.5, "of": "macs", "round": 2, "mode": "prune", "floor": 0.05}.items()
    assert step.measures.params == sum(p.numel() for p in small.module.parameters())
    assert step.measures.macs == macs(small.module, (3, 32, 32))
    assert step.error == pytest.approx(float((outputs(small.module, image)[0] - before).norm() / before.norm()), rel=1e-5)
    kept = 100 * step.measures.macs / macs(network(width=8).module, (3, 32, 32))
    assert re.search(rf"hinge: {kept:.1f} % of macs kept", "\n".join(lines))
    assert re.search(rf"output error {step.error:.3f} on random images", "\n".join(lines))
    assert all(not edit.tensors for edit in step.edits if isinstance(edit, Replace))


def test_what_lands_far_from_the_ratio_is_told_beside_it():
    """A tiny network's steps are wide."""
    for method, ratio in (("csg", 0.6), ("hinge", 0.5)):
        lines: list[str] = []
        given = network(width=4)
        counted = measure.params if method == "csg" else partial(measure.macs, input_shape=(3, 32, 32))
        whole = counted(given.module)
        compress(given, method, get(method)(), Target(ratio, round_to=None if method == "csg" else 1), log=lines.append)
        kept = counted(given.module) / whole
        assert (lines[-1].endswith(f"kept ({100 * ratio:g} % asked for)")) == (abs(kept - ratio) > 0.02) == (method == "csg")


def test_edits_are_applied_once_and_nothing_is_built_to_probe(monkeypatch):
    applied = []
    apply_ = surgery.apply_

    def counting_(model: nn.Module, edits: object) -> None:
        applied.append((isinstance(next(model.parameters()), FakeTensor), edits))
        apply_(model, edits)

    monkeypatch.setattr(surgery, "apply_", counting_)
    compress(network(width=8), "hinge", hinge("prune"), Target(0.5))
    assert [fake for fake, _ in applied] == [True, False]  # does a cut run in eval and in train mode; then the cut
    applied.clear()
    compress(network(width=8), "hinge", hinge(), Target(0.3))
    assert sum(not fake for fake, _ in applied) <= 2  # what is cut, then what is replaced


def test_the_law_is_asked(monkeypatch):
    """A cut that keeps other channels than it says does not get through the driver."""
    keep_ = surgery._keep_

    def wrong_(model: nn.Module, edit: Keep, done: dict, holders: dict) -> None:
        rolled = tuple(sorted((i + 1) % 8 for i in edit.index))
        keep_(model, Keep(edit.module, edit.axis, rolled) if edit.module == "layer1.0.conv1" else edit, done, holders)

    monkeypatch.setattr(surgery, "_keep_", wrong_)
    with pytest.raises(CompactError, match="differs from the masked one"):
        compress(network(width=8), "hinge", hinge("prune"), Target(0.5))


def test_the_ratio_is_of_what_was_read():
    given = network(width=16)
    whole = macs(given.module, (3, 32, 32))
    twice = compress(compress(given, "hinge", hinge(), Target(0.7)), "hinge", hinge(), Target(0.7))
    assert len(twice.recipe.steps) == 2
    assert 0.46 < macs(twice.module, (3, 32, 32)) / whole <= 0.49


def test_out_of_reach_names_a_ratio_that_works():
    with pytest.raises(
        CompactError, match=r"--ratio 0.003 of macs is out of reach: .* try --ratio [\d.]+, or --nearest"
    ) as caught:
        compress(network(width=8), "hinge", hinge("prune"), Target(0.003))
    nearest = float(re.search(r"try --ratio ([\d.]+)", str(caught.value))[1])
    whole = macs(network(width=8).module, (3, 32, 32))
    reached = macs(compress(network(width=8), "hinge", hinge("prune"), Target(nearest)).module, (3, 32, 32))
    taken = macs(compress(network(width=8), "hinge", hinge("prune"), Target(0.003, nearest=True)).module, (3, 32, 32))
    assert nearest - 0.001 < taken / whole <= reached / whole <= nearest


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.5, float("nan"), float("inf")])
def test_a_share_is_between_0_and_1(ratio):
    with pytest.raises(UsageError, match=r"--ratio .*: it is the share to keep, between 0 and 1"):
        Target(ratio)


def test_a_rounding_is_1_or_more():
    with pytest.raises(UsageError, match="--round 0: it is 1 or more"):
        Target(0.5, round_to=0)


def test_what_a_method_is_not_for_is_refused(monkeypatch):
    monkeypatch.setattr(Hinge, "of", ("params",))
    with pytest.raises(UsageError, match="--of macs: hinge stores less and computes the same; use --of params"):
        compress(network(width=4), "hinge", hinge(), Target(0.5, "macs"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    given = network(width=4)
    given.module.layer3[0].bn2.weight.data[2] = value
    with pytest.raises(CompactError, match=r"random: layer3\.0\.bn2\.weight holds NaN or Inf"):
        compress(given, "hinge", hinge(), Target(0.5))


def test_an_infinite_variance_is_no_obstacle():
    given = network(width=8)
    given.module.layer2[0].bn1.running_var[3] = float("inf")
    small = compress(given, "hinge", hinge(), Target(0.5))
    assert outputs(small.module, torch.randn(2, 3, 32, 32))[0].isfinite().all()


def test_a_network_that_gives_zero_can_be_compressed_and_saved():
    given = network(width=8)
    given.module.linear.weight.data.zero_()
    given.module.linear.bias.data.zero_()
    artefact.dumps(compress(given, "hinge", hinge("prune"), Target(0.7)))


@pytest.mark.parametrize("name", ["hard_coded_view", "hard_coded_shuffle"])
def test_what_a_number_in_the_code_holds_stays_and_the_rest_goes(name):
    """DESIGN, channel ids: found by running the smaller network; those sets are locked, the rest still go."""
    module = randomise_(getattr(networks, name)())
    width = module[2].out_channels
    module[2].weight.data[-2:] *= 1e-6  # what hinge would rather remove than anything else
    module[2].bias.data[-2:] *= 1e-6
    whole = macs(module, SHAPE)
    small = compress(own(module), "hinge", hinge("prune"), Target(0.75)).module
    assert 0.5 * whole < macs(small, SHAPE) <= 0.75 * whole
    assert small[2].out_channels == width
    small.train()(torch.randn(2, *SHAPE)).sum().backward()


@pytest.mark.parametrize("name", networks.VALUE_DEPENDENT)
def test_code_that_depends_on_values_is_compressed_with_a_warning_and_never_calibrated(name):
    """What a branch that was not taken reads is not known: no channel goes where it has layers of its own, ranks may."""
    given, lines = own(randomise_(networks.VALUE_DEPENDENT[name]())), []
    images = driver.Calibration(torch.zeros(8, *SHAPE, dtype=torch.uint8), "zeros")
    with pytest.raises(CompactError, match="cannot be calibrated; leave out --data"):
        compress(given, "hinge", hinge(), Target(0.9), calibration=images)
    (step,) = compress(given, "hinge", hinge(), Target(0.9), log=lines.append).recipe.steps
    assert step.edits
    assert name != "branching_apart" or all(isinstance(edit, Replace) for edit in step.edits)
    assert "depends on the values of tensors" in lines[0]


def test_the_compressed_network_is_the_masked_original():
    """All the way through the driver, by arithmetic of our own."""
    given = network(width=8)
    original = named("cifar:resnet8", width=8)
    small = compress(given, "hinge", hinge("prune"), Target(0.5))
    edits = [edit for edit in small.recipe.edits if isinstance(edit, Keep)]
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = outputs(masked(original, edits), image)[0]
    torch.testing.assert_close(outputs(small.module.double(), image)[0], expected, rtol=1e-9, atol=1e-9)


def test_the_ratio_is_of_the_parameters_that_were_read(monkeypatch):
    """A weight norm has more of them than the plain layer that it becomes."""
    targets: list[float] = []

    def noted(budget: Budget, *arguments, **options):
        targets.append(budget.target)
        return dials.solve(budget, *arguments, **options)

    monkeypatch.setattr("compactcli.methods.hinge.solve", noted)
    given = own(randomise_(AWKWARD["weight_norm"]()))
    before = measure.params(given.module)
    small = compress(given, "hinge", hinge("prune"), Target(0.6, of="params", round_to=1))
    assert targets == [0.6 * before]
    assert measure.params(small.module) <= 0.6 * before


def hooked() -> nn.Module:
    """Holds a result of operations beside its parameters, which deepcopy does not take."""
    model = AWKWARD["in_place"]()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])
    return model


@pytest.mark.parametrize("name", [*AWKWARD, "hooked"])
def test_a_copy_is_the_same_network_and_another_module(name):
    given = own(randomise_(hooked() if name == "hooked" else AWKWARD[name]()))
    image = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    given.module.eval()(image.clone())  # with gradients: what a module keeps of it is a result then
    copied_, wanted = given.copied(), outputs(given.module, image)
    for parameter in given.module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(one, two) for one, two in zip(outputs(copied_.module, image), wanted, strict=True))


def test_what_plain_layers_have_met_is_met(monkeypatch):
    """Nothing is looked for, down to the least of numbers, where the network is small enough as it is."""
    given = own(randomise_(AWKWARD["weight_norm"]()))
    before = measure.params(given.module)
    monkeypatch.setattr(dials, "State", None)
    small = compress(given, "hinge", hinge("prune"), Target(0.999, of="params"))
    assert measure.params(small.module) <= 0.999 * before
    assert small.recipe.steps[-1].error < 1e-5


# Real checkpoints


def test_a_real_network_at_three_tenths_of_its_macs(checkpoints, tmp_path):
    method = Hinge(Hinge.Options(favour="accuracy"))
    given = open_model(checkpoints / "resnet56-4bfd9763.th")
    assert given.recipe.architecture == "cifar:resnet56"
    small = compress(given, "hinge", method, Target(0.3))
    path = tmp_path / "small.safetensors"
    artefact.save(small, str(path))
    found = open_model(path)
    assert macs(found.module, (3, 32, 32)) / 125_485_696 == pytest.approx(0.3, abs=0.01)
    image = torch.randn(4, 3, 32, 32)
    assert torch.equal(outputs(found.module, image)[0], outputs(small.module, image)[0])
    kinds = {type(edit) for edit in found.recipe.edits}
    assert {Keep, Replace} <= kinds
    again = compress(open_model(checkpoints / "resnet56-4bfd9763.th"), "hinge", method, Target(0.3))
    assert artefact.dumps(again) == path.read_bytes()


# Fine-tuning


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    preprocessing = Preprocessing((0.5,), (0.5,))
    return sources.open_dataset("digits", input_shape=(1, 16, 16), preprocessing=preprocessing, limit=200)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Network, Path]:
    """A small network, made from an original that lies beside it."""
    original = tmp_path / "original.pt"
    torch.save(named("cifar:resnet8", width=4, in_channels=1).state_dict(), original)
    wishes = Wishes(input_shape=(1, 16, 16), mean=(0.5,), std=(0.5,))
    small = compress(open_model(original, wishes), "hinge", hinge(), Target(0.7))
    artefact.save(small, str(tmp_path / "small.safetensors"))
    return open_model(tmp_path / "small.safetensors"), original


SETTINGS = train.Settings(epochs=1, batch_size=50)


def test_the_original_beside_the_input_is_the_teacher(pair, tmp_path, monkeypatch):
    small, original = pair
    lines: list[str] = []
    teacher = find_teacher(small, None, log=lines.append)
    assert teacher.sha256 == small.recipe.source.sha256
    assert lines == ["teacher: original.pt"]
    assert find_teacher(small, "none") is None
    assert find_teacher(small, str(original)).name == "original.pt"

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    original.rename(moved / "original.pt")
    lines.clear()
    assert find_teacher(small, None, log=lines.append) is None
    assert lines == ["no teacher: original.pt is not beside the input; training without one (--teacher FILE gives one)"]
    monkeypatch.chdir(moved)
    assert find_teacher(small, None).name == "original.pt"


def test_the_teacher_is_the_original_as_the_user_described_it(tmp_path):
    """What the file of the original does not say, the recipe of the small one does: shape, shortcut, mean and deviation."""
    original = tmp_path / "original.pt"
    torch.save(named("cifar:resnet8", width=4, in_channels=1).state_dict(), original)
    wishes = Wishes(arch_kwargs={"shortcut": "append"}, input_shape=(1, 16, 16), mean=(0.25,), std=(0.125,))
    small = compress(open_model(original, wishes), "hinge", hinge(), Target(0.7))
    for teacher in (find_teacher(small, None), find_teacher(small, str(original))):
        assert teacher.input_shape == (1, 16, 16)
        assert teacher.recipe.kwargs == small.recipe.kwargs
        assert teacher.recipe.preprocessing == small.recipe.preprocessing


def test_another_file_of_that_name_is_no_teacher(pair):
    small, original = pair
    torch.save(named("cifar:resnet8", width=4, in_channels=1, num_classes=9).state_dict(), original)
    assert find_teacher(small, None) is None


def test_a_wrong_file_of_that_name_does_no_harm(pair):
    """Nobody asked for it: a file that is no checkpoint is passed over like one that is not there."""
    small, original = pair
    original.write_bytes(b"something else entirely")
    assert find_teacher(small, None) is None


def test_an_original_that_needs_trust_is_the_teacher_with_it_alone(tmp_path):
    """A whole network of torch.save: nobody asked for it, so that it is no error without --trust-pickle."""
    original = tmp_path / "original.pt"
    torch.save(named("cifar:resnet8", width=4, in_channels=1), original)
    wishes = Wishes(input_shape=(1, 16, 16), mean=(0.5,), std=(0.5,), trust_pickle=True)
    small = compress(open_model(original, wishes), "hinge", hinge(), Target(0.7))
    small.folder = tmp_path
    lines: list[str] = []
    assert find_teacher(small, None, log=lines.append) is None
    assert len(lines) == 1
    assert "only --trust-pickle unpickles it" in lines[0]
    assert lines[0].endswith("; training without one")
    with pytest.raises(CompactError, match="only --trust-pickle unpickles it"):
        find_teacher(small, str(original))
    for wanted in (None, str(original)):
        teacher = find_teacher(small, wanted, trust_pickle=True)
        assert teacher is not None
        assert teacher.recipe.preprocessing == small.recipe.preprocessing


def test_a_teacher_of_ones_own_factory_is_opened_by_it(tmp_path, monkeypatch):
    """Other weights of the network that --arch names, which no file says of itself."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Flatten())"
    )
    arch = f"{tmp_path}/own_net.py:make"
    wishes = Wishes(arch=arch, input_shape=(3, 8, 8), mean=(0.25,) * 3, std=(0.5,) * 3)
    for name in ("one.pt", "other.pt"):
        torch.save(architectures.user(arch, None, (3, 8, 8)).build(initialise=True).state_dict(), tmp_path / name)
    one = open_model(tmp_path / "one.pt", wishes)
    for given in (one, compress(copy.deepcopy(one), "hinge", hinge("prune"), Target(0.7))):
        teacher = artefact.open_beside(tmp_path / "other.pt", given, arch)
        assert teacher.input_shape == (3, 8, 8)
        with pytest.raises(CompactError, match="cannot name the architecture"):
            artefact.open_beside(tmp_path / "other.pt", given)
    wished = artefact.open_beside(tmp_path / "other.pt", one, arch, pre=wishes)
    assert wished.recipe.preprocessing == one.recipe.preprocessing


def test_an_original_in_a_folder_is_found(tmp_path):
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(named("cifar:resnet8", width=4, in_channels=1).state_dict(), folder / "pytorch_model.bin")
    wishes = Wishes(input_shape=(1, 16, 16), mean=(0.25,), std=(0.125,))
    small = compress(open_model(folder, wishes), "hinge", hinge(), Target(0.7))
    small.folder = tmp_path
    for wanted in (None, str(folder)):
        teacher = find_teacher(small, wanted)
        assert teacher is not None
        assert teacher.input_shape == (1, 16, 16)
        assert teacher.recipe.preprocessing == small.recipe.preprocessing


def test_a_teacher_that_was_asked_for_must_be_there(pair):
    with pytest.raises(CompactError, match=r"nowhere\.pt: no such file"):
        find_teacher(pair[0], "nowhere.pt")


def test_a_network_without_history_has_no_teacher(pair):
    assert find_teacher(open_model(pair[1]), None) is None
    assert find_teacher(network(width=4), None) is None


def test_weights_from_before_training_are_told_of(pair, digits):
    """Where no epoch is better they are what is kept, and the file is the input's."""
    small, _ = pair
    before, lines = [t.clone() for t in small.module.parameters()], []
    tuned = finetune(small, digits, replace(SETTINGS, lr=0.0), watch=Watch(log=lines.append))
    assert tuned.recipe.steps[-1].options["best_epoch"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, tuned.module.parameters(), strict=True))
    (line,) = [line for line in lines if line.startswith("no epoch did better")]
    assert line.endswith("which are kept; try --keep last")
    lines.clear()
    finetune(small, digits, replace(SETTINGS, lr=0.0), keep="last", watch=Watch(log=lines.append))
    assert not [line for line in lines if line.startswith("no epoch did better")]


def test_fine_tuning_is_one_step(pair, digits):
    small, original = pair
    before = [t.clone() for t in small.module.parameters()]
    lines: list[str] = []
    tuned = finetune(
        small, digits, SETTINGS, teacher=open_model(original, Wishes(input_shape=(1, 16, 16))), watch=Watch(log=lines.append)
    )
    assert any(not torch.equal(a, b) for a, b in zip(before, tuned.module.parameters(), strict=True))
    compressed, step = tuned.recipe.steps
    assert compressed.command == "compress"
    assert (step.command, step.method, step.edits, step.error) == ("finetune", None, (), None)
    assert step.options["teacher"] == "original.pt"
    assert (step.options["epochs"], step.options["lr"], step.options["seed"]) == (1, 0.05, 0)
    assert step.options["best_epoch"] in (0, 1)
    assert step.measures.evaluated == {"dataset": "digits", "split": "test", "images": len(digits.test)}
    assert 0 <= step.measures.accuracy <= 100
    assert step.measures.params == compressed.measures.params
    assert tuned.recipe.dataset == "digits"
    assert tuned.recipe.classes == tuple("0123456789")
    assert tuned.recipe.source.measures.accuracy is not None  # the teacher is the original: its accuracy is known now
    assert lines[-1] == f"test accuracy {step.measures.accuracy:.2f} %"
    assert artefact.dumps(open_model(artefact.dumps(tuned))) == artefact.dumps(tuned)


def test_without_a_teacher_its_options_are_absent(pair, digits):
    tuned = finetune(pair[0], digits, SETTINGS)
    options = tuned.recipe.steps[-1].options
    assert options["teacher"] is options["distill_weight"] is options["temperature"] is None
    assert tuned.recipe.source.measures.accuracy is None


def test_the_same_seed_gives_the_same_file(pair, digits, tmp_path):
    first, second = (artefact.dumps(finetune(open_model(tmp_path / "small.safetensors"), digits, SETTINGS)) for _ in range(2))
    assert first == second


def test_a_teacher_of_another_kind_is_refused(pair, digits):
    other = network(width=4)
    with pytest.raises(
        CompactError, match=r"the teacher random has 10 classes and input \(3, 32, 32\), the network 10 and \(1, 16, 16\)"
    ):
        finetune(pair[0], digits, SETTINGS, teacher=other)


def test_data_of_other_classes_is_refused(digits):
    given = own(randomise_(nn.Sequential(networks.conv(1, 4), *networks.head(4))), (1, 16, 16))
    assert given.num_classes == CLASSES
    with pytest.raises(CompactError, match=r"10 classes|classes"):
        finetune(given, digits, SETTINGS)


def test_data_without_a_name_is_not_remembered(pair):
    unnamed = data.Dataset(
        "folder",
        False,
        None,
        data.from_tensors(torch.zeros(40, 1, 16, 16, dtype=torch.uint8), torch.arange(40) % 10, "train"),
        None,
    )
    tuned = finetune(pair[0], unnamed, SETTINGS)
    assert tuned.recipe.dataset is None
    step = tuned.recipe.steps[-1]
    assert step.measures.evaluated == {"dataset": "folder", "split": "validation", "images": None}
    json.dumps(step.measures.evaluated)


def test_the_source_is_kept_through_all_steps(pair, digits):
    small, original = pair
    tuned = finetune(small, digits, SETTINGS)
    assert isinstance(tuned.recipe.source, Source)
    assert tuned.recipe.source.sha256 == open_model(original).sha256


class Bare(nn.Module):
    """Weights of its own, without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(torch.randn(o, i, 3, 3) / 9 for o, i in ((8, 3), (12, 8), (12, 12)))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kernel in self.kernels:
            x = torch.relu(nn.functional.conv2d(x, kernel, padding=1))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["bare", "attention", "tied_layers", "gate", "twice"])
def test_the_rows_of_a_plan_add_up(name):
    """Each row has what its layer has alone, however many weights a module has."""
    torch.manual_seed(0)
    model = Bare() if name == "bare" else randomise_(AWKWARD[name]())
    whole = measure.params(model)
    plan = driver.planned(own(model), "hinge", hinge("prune"), Target(0.7))
    rows = plan["layers"]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert row["before"]["params"] >= row["after"]["params"]
        assert len(row["after"]["weight_shapes"]) == 1
        assert (row["after"]["weight_shapes"] == row["before"]["weight_shapes"]) == row["why"].startswith("left: ")
    assert sum(row["before"]["params"] for row in rows) <= whole
    assert sum(row["before"]["macs"] for row in rows) <= plan["before"]["macs"]
    assert sum(row["after"]["macs"] for row in rows) <= plan["after"]["macs"]
