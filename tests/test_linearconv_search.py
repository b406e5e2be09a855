"""What linearconv makes of a network by its options, and how it trains what it made."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import conv, head, randomise_
from test_compress import own
from test_resume import DeadError
from test_search import images, settings
from test_train import same, weights
from torch import Tensor, nn

from compactcli import artefact, channels, kernels, measure, methods, surgery
from compactcli.artefact import Wishes
from compactcli.budget import Budget
from compactcli.compress import Calibration, Search, Target, compress
from compactcli.errors import UsageError
from compactcli.graph import trace
from compactcli.history import Watch
from compactcli.methods import Progress, get, linearconv, parse_options
from compactcli.recipe import Measures, Preprocessing, Recipe, Replace, Step

LinearConv = get("linearconv")
DIGITS = Path(__file__).parents[1] / "examples" / "digits-resnet20.pt"


def chosen(*options: str) -> Any:
    return LinearConv(parse_options(LinearConv, options))


def progress(step: int, share: float = 0.5) -> Progress:
    return Progress(step, 0, share, (0.1,))


# What --set asks for


@pytest.fixture(scope="module")
def digits() -> tuple[Any, ...]:
    """The example, and what is known of it before a method starts."""
    module = artefact.open_model(DIGITS, Wishes("cifar:resnet20", {"in_channels": 1})).module
    graph = trace(module, (1, 32, 32))
    return module, channels.find(graph, module), graph


def begun(digits: tuple[Any, ...], ratio: float, *options: str) -> tuple[list[Replace], Budget]:
    module, sets, graph = digits
    budget = Budget(graph, sets, module, ratio=ratio, of="params")
    return chosen(*options).start(module, sets, budget), budget


def made(digits: tuple[Any, ...], edits: list[Replace]) -> nn.Module:
    module = artefact.open_model(DIGITS, Wishes("cifar:resnet20", {"in_channels": 1})).module
    surgery.apply_(module, edits)
    return module


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_handful_of_images_is_enough_to_begin_with(count):
    """Their moments are of low rank, and rounding is larger than the least ridge."""
    given = artefact.fresh(Wishes("cifar:resnet20", {"in_channels": 1}, (1, 8, 8), (0.5,), (0.5,)), 0)
    randomise_(given.module)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    compress(given, "linearconv", chosen(), Target(0.7), calibration=Calibration(pixels, "noise"))
    assert given.recipe.steps[-1].error < 2


@pytest.mark.parametrize(
    "options", [(), ("variant=full",), ("variant=lowrank",), ("variant=rankratio",), ("variant=lowrank", "share=0.3")]
)
def test_primary_filters_and_ranks_are_multiples_of_the_round(digits, options):
    module, sets, graph = digits
    budget = Budget(graph, sets, module, ratio=0.7, of="params", round_to=4)
    edits = chosen(*options).start(module, sets, budget)
    assert edits
    for edit in edits:
        assert edit.options["primary"] % 4 == 0 == edit.options.get("rank", 4) % 4


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("variant=full",), "full"),
        (("variant=lowrank", "share=0.5"), "lowrank"),
        (("variant=rankratio", "share=0.5"), "lowrank"),
        (("variant=sparse", "share=0.5"), "sparse"),
    ],
)
def test_a_variant_is_that_of_every_layer(digits, options, kind):
    edits, budget = begun(digits, 0.6, *options)
    assert {edit.layer for edit in edits} == {f"linearconv.{kind}"}
    assert 0.97 * budget.target < measure.params(made(digits, edits)) <= budget.target


@pytest.mark.parametrize("options", ["rank=2", "rank_share=0.1", "variant=full kept=0.5", "variant=sparse rank=2"])
def test_an_option_of_another_variant_is_refused(digits, options):
    with pytest.raises(UsageError, match=r"--set (rank|rank_share|kept): it is for variant=\w+, and this is \w+"):
        begun(digits, 0.6, *options.split())


def test_numbers_that_are_given_are_those_of_every_layer(digits):
    outputs = {name: module.out_channels for name, module in digits[0].named_modules() if isinstance(module, nn.Conv2d)}
    for edit in begun(digits, 0.6, "variant=lowrank", "share=0.25", "rank=3")[0]:
        assert edit.options == {"primary": outputs[edit.module] // 4, "rank": 3}
    for edit in begun(digits, 0.6, "variant=rankratio", "share=0.25", "rank_share=0.5")[0]:
        assert edit.options == {"primary": outputs[edit.module] // 4, "rank": outputs[edit.module] // 8}
    for edit in begun(digits, 0.6, "variant=sparse", "share=0.5", "kept=0.3")[0]:
        half = outputs[edit.module] // 2
        assert edit.options == {"primary": half, "kept": int(0.3 * half**2)}
        assert len(edit.tensors["values"]) == edit.options["kept"]


@pytest.mark.parametrize("options", [("variant=rankratio", "rank_share=4"), ("variant=lowrank", "rank=100")])
def test_a_rank_that_there_cannot_be_is_as_many_as_filters(digits, options):
    for edit in begun(digits, 0.7, *options)[0]:
        assert edit.options["rank"] <= len(edit.tensors["place"])


@pytest.mark.parametrize("name", ["linearconv", "csg"])
def test_tied_weights_stay_tied(name):
    """One layer under two names, and two layers with one weight: stored anew, either would no longer be one."""
    layers = [conv(3, 16), conv(16, 16), conv(16, 16), conv(16, 16), conv(16, 32)]
    layers[2].weight = layers[3].weight
    model = randomise_(nn.Sequential(*layers[:2], nn.ReLU(), layers[1], nn.ReLU(), *layers[2:], *head(32)))
    whole = measure.params(model)
    small = compress(own(model), name, get(name)(), Target(0.75)).module
    assert measure.params(small) <= 0.75 * whole
    assert small[1] is small[3]
    assert small[5].weight is small[6].weight
    assert kernels.layers(small)


# The losses


def sparse(kept: int = 12, seed: int = 0) -> nn.Module:
    """A sparse layer with all 15 coefficients, of which 12 shall stay, and a full one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1))
    found = [("0", "sparse", {"primary": 5, "kept": 15}), ("1", "full", {"primary": 3})]
    surgery.apply_(model, [Replace(path, f"linearconv.{kind}", options) for path, kind, options in found])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model[0].mask.copy_(torch.tensor([0xFF, 0x7F]))
    return model


def searching(model: nn.Module, *options: str, wanted: int = 12) -> Any:
    method = chosen(*options)
    method.wanted = {"0": wanted}
    method.attach(model, [])
    return method


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (2, 1, 3, 3), (9, 2, 1, 1), (1, 4, 3, 3)])
def test_the_correlation_is_pearsons(shape):
    """corr_reg.py: |corr - I| summed over all pairs."""
    primary = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pearson = np.atleast_2d(np.corrcoef(primary.flatten(1).double().numpy()))
    expected = np.abs(pearson - np.eye(shape[0])).sum()
    assert float(linearconv.correlation(primary)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_filters_without_variance_correlate_with_none():
    primary = torch.cat([torch.ones(2, 3, 3, 3), torch.randn(2, 3, 3, 3)]).requires_grad_()
    loss = linearconv.correlation(primary)
    loss.backward()
    assert loss.item() == pytest.approx(linearconv.correlation(primary[2:]).item(), rel=1e-5)
    assert primary.grad.isfinite().all()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}


@pytest.mark.parametrize("every", [10, 3])
def test_losses_act_on_every_tenth_step_alone(every):
    model = sparse()
    method = searching(model, *([] if every == 10 else [f"every={every}"]))
    acted = []
    for step in range(30):
        model.zero_grad()
        method.regularise(model, progress(step))
        acted += [step] if gradients(model) else []
    assert acted == list(range(every - 1, 30, every))


def test_the_correlation_draws_primary_filters_and_l1_the_coefficients_that_are_searched():
    model = sparse()
    searching(model, "l1=0").regularise(model, progress(9))
    drawn = gradients(model)
    assert drawn.keys() == {"0.primary", "1.primary"}
    for name, gradient in drawn.items():
        alone = model.get_parameter(name).detach().clone().requires_grad_()
        (0.01 * linearconv.correlation(alone)).backward()
        torch.testing.assert_close(gradient, alone.grad)
    model.zero_grad()
    searching(model, "correlation=0", "l1=0.02").regularise(model, progress(9))
    drawn = gradients(model)
    assert drawn.keys() == {"0.values"}
    assert torch.equal(drawn["0.values"], 0.02 * model[0].values.detach().sign())
    model.zero_grad()
    chosen("correlation=0").regularise(model, progress(9))  # without a search no coefficient is drawn
    assert not gradients(model)


def test_a_step_after_a_step_draws_its_own_layers_once():
    """Each method of the history has hooks; of layers that a later step made anew only that step's."""
    model, steps = sparse(), []
    for made in (["0", "1"], ["1"]):
        edits = tuple(Replace(path, "linearconv.full", {"primary": 3}) for path in made)
        steps.append(
            Step("compress", "linearconv", chosen(f"correlation=0.{len(steps) + 1}").recorded(), edits, Measures(), None, "")
        )
    recipe = Recipe("own.py:make", {}, (3, 8, 8), Preprocessing((0.5,) * 3, (1.0,) * 3), steps=tuple(steps))
    for hook in methods.attached(recipe, model):
        hook.regularise(model, progress(9))
    together = gradients(model)
    model.zero_grad()
    (0.1 * linearconv.correlation(model[0].primary) + 0.2 * linearconv.correlation(model[1].primary)).backward()
    assert all(torch.allclose(together[name], own) for name, own in gradients(model).items())
    assert together.keys() == gradients(model).keys()


def test_losses_add_to_the_gradients_there_are():
    model = sparse()
    searching(model).regularise(model, progress(9))
    own = gradients(model)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    searching(model).regularise(model, progress(9))
    torch.testing.assert_close(model[0].primary.grad, own["0.primary"] + 1)


# The thresholds


def test_a_threshold_moves_as_in_the_paper():
    """2 / (1 + 10^(10 (q - q*))) - 1 of the gain, by the share q of zeros under the threshold so far."""
    model = sparse()
    method = searching(model, "gain=0.1", "moves=4", wanted=9)
    expected, size = 0.0, model[0].values.detach().abs().numpy()
    for step in range(200):
        method.project(model, progress(step))
        if step % 4 == 3:
            zeros = float((size <= expected).mean())
            expected += (2 / (1 + 10 ** (10 * (zeros - 6 / 15))) - 1) * 0.1
        assert method.thresholds.get("0", 0.0) == pytest.approx(expected, rel=1e-6)
        assert np.array_equal(model[0].live.numpy(), size > np.float32(expected) if step >= 3 else np.ones(15, bool))
    assert abs((size > expected).sum() - 9) <= 1


def test_without_a_gain_the_wanted_zeros_are_there_by_half_of_the_search():
    model = sparse()
    method = searching(model, "moves=1", wanted=5)
    left = []
    for step in range(10):
        method.project(model, progress(step, (step + 1) / 10))
        left.append(int(model[0].live.sum()))
    assert left == [13, 11, 9, 7, 5, 5, 5, 5, 5, 5]
    assert model[0].values.detach().abs()[model[0].live].min() > model[0].values.detach().abs()[~model[0].live].max()


def test_what_is_left_out_makes_nothing_and_learns_nothing():
    model = sparse()
    method = searching(model, "moves=1", wanted=5)
    method.project(model, progress(0, 1.0))
    gone = ~model[0].live
    model[0](torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert not model[0].values.grad[gone].any()
    assert model[0].values.grad[~gone].all()
    before = model[0].kernel().detach()
    with torch.no_grad():
        model[0].values[gone] += 0.01
    assert torch.equal(model[0].kernel(), before)
    surgery.apply_(model, method.finish(model, None, None, None))
    assert (len(model[0].values), int(model[0].bits().sum()), model[0].live) == (5, 5, None)
    torch.testing.assert_close(model[0].kernel(), before)


def test_one_that_came_back_to_length_is_used_again():
    model = sparse()
    method = searching(model, "moves=1", wanted=5)
    method.project(model, progress(0, 1.0))
    first = int((~model[0].live).nonzero()[0])
    with torch.no_grad():
        model[0].values[first] = 100.0
    method.project(model, progress(1, 1.0))
    assert model[0].live[first]
    assert int(model[0].live.sum()) == 5


# The whole way


def network() -> artefact.Network:
    one = artefact.fresh(Wishes("cifar:resnet8", {"width": 8, "num_classes": 3}), 0)
    randomise_(one.module)
    return one


class Watching(LinearConv):  # type: ignore[misc, valid-type]
    """Notes the thresholds, and what is alive, after every step."""

    def project(self, model: nn.Module, progress: Progress) -> None:
        super().project(model, progress)
        self.noted = [*getattr(self, "noted", []), (dict(self.thresholds), {n: int(self.alive(model, n)) for n in self.wanted})]

    @staticmethod
    def alive(model: nn.Module, name: str) -> Tensor:
        return model.get_submodule(name).live.sum()


def run(path: Path | None, *options: str, die_at: int | None = None, resume: bool = False) -> tuple[dict[str, Tensor], Any]:
    """The weights after a compression with a search of 9 steps that may die at a step."""
    steps = 0

    def step(done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == die_at:
            raise DeadError

    one, dataset = network(), images()
    trained = settings(epochs=3, save_every=2, lr=0.05)
    search = Search(dataset, trained, network(), None if path is None else path / "run.safetensors", resume, Watch(progress=step))
    method = Watching(parse_options(LinearConv, ("variant=sparse", "share=0.5", "moves=2", "every=2", *options)))
    calibration = Calibration(dataset.train.images()[:64], "colours")
    compress(one, "linearconv", method, Target(0.6), calibration=calibration, search=search)
    return {**weights(one.module), "edits": torch.tensor(list(one.recipe.dumps().encode()))}, (method, one.module)


@pytest.fixture(scope="module")
def unbroken() -> tuple[dict[str, Tensor], Any]:
    return run(None)


def test_a_resumed_search_equals_an_unbroken_one(unbroken, tmp_path):
    whole, (method, module) = unbroken
    for death in (5, 2):
        with pytest.raises(DeadError):
            run(tmp_path, die_at=death, resume=True)
    broken, (resumed, _) = run(tmp_path, resume=True)
    assert broken.keys() == whole.keys()
    assert same(whole, broken)
    assert resumed.thresholds == method.thresholds
    made_ = kernels.layers(module)
    assert {name: len(made_[name].values) for name in made_} == method.wanted
    assert not any(name.endswith("live") for name in whole)


def test_a_resumed_search_goes_on_from_its_thresholds(tmp_path):
    """With a gain each is where the steps before have moved it."""
    whole, (method, _) = run(None, "gain=0.05")
    with pytest.raises(DeadError):
        run(tmp_path, "gain=0.05", die_at=6, resume=True)
    broken, (resumed, _) = run(tmp_path, "gain=0.05", resume=True)
    assert same(whole, broken)
    assert resumed.thresholds == method.thresholds
    assert all(method.thresholds.values())


def test_thresholds_move_while_it_trains(unbroken):
    _, (method, _) = unbroken
    assert method.wanted
    for name, wanted in method.wanted.items():
        thresholds = [noted[0].get(name, 0.0) for noted in method.noted]
        alive = [noted[1][name] for noted in method.noted]
        assert thresholds[0] == 0 < thresholds[1] < thresholds[3]
        assert alive[0] > alive[1] > alive[3] >= alive[-1] == wanted
        assert all(math.isfinite(each) for each in thresholds)


def test_steps_against_the_loss_draw_filters_apart():
    """As in fine-tuning, where no coefficient is left out."""
    model = sparse()
    hook = chosen("correlation=1", "every=1")
    hook.attach(model, [])
    start = sum(linearconv.correlation(layer.primary).item() for layer in model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(50):
        optimizer.zero_grad()
        hook.regularise(model, progress(step))
        optimizer.step()
    assert sum(linearconv.correlation(layer.primary).item() for layer in model) < 0.5 * start
    assert model[0].live is None
