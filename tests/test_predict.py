"""What is predicted of methods and layers, without compressing anything; and plans, which say what compress then does."""

import copy

import pytest
import torch
from networks import named, randomise_
from test_compress import own

from compactcli import data, measure, methods, moments, predict, redundancy, report, sources
from compactcli.analysis import Predicted, analyse
from compactcli.artefact import Network
from compactcli.compress import Target, compress, planned
from compactcli.layers import layers
from compactcli.plan import plan


@pytest.fixture(scope="module")
def given() -> Network:
    return own(named("cifar:resnet8", width=8), (3, 16, 16))


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return sources.open_dataset(
        "digits", input_shape=(3, 16, 16), preprocessing=own(torch.nn.Identity()).recipe.preprocessing, limit=64
    )


@pytest.fixture(scope="module")
def tree(given, dataset):
    wanted = Predicted(methods.names(), (0.8, 0.6), "params")
    return analyse(copy.deepcopy(given), dataset=dataset, wanted=wanted, timed=True)


def test_smaller_layers_and_networks_lose_more(tree):
    free = 0
    for layer in tree["layers"]:
        for points in layer["sensitivity"].values():
            errors = [point["error"] for point in points or ()]
            assert errors == sorted(errors)
            assert not points or errors[-1] > 0
        assert (layer["sensitivity"]["channels"] is not None) == (layer["sets"] > 0)
        free += layer["sets"] > 0
    assert free > 5
    rows = {(row["method"], row["ratio"]): row["error"] for row in tree["predictions"]}
    assert len(rows) == 10
    assert all(0 < rows[name, 0.8] < rows[name, 0.6] for name in methods.names())


def test_rows_come_in_order_and_the_suggestion_is_one_of_them(tree):
    by_ratio = [[row["error"] for row in tree["predictions"] if row["ratio"] == ratio] for ratio in (0.8, 0.6)]
    assert all(errors == sorted(errors) for errors in by_ratio)
    assert any(
        (row["method"], row["ratio"]) == (tree["suggestion"]["method"], tree["suggestion"]["ratio"])
        for row in tree["predictions"]
    )


def test_shares_of_time_are_of_one_pass(tree):
    shares = [layer["time"] for layer in tree["layers"]]
    assert all(share > 0 for share in shares)
    assert sum(shares) < 1


def test_activations_that_are_copies_are_redundant(dataset):
    conv = torch.nn.Conv2d(3, 6, 3)
    conv.weight.data[3:] = conv.weight.data[:3] * 2
    conv.bias.data.zero_()
    images = dataset.train.images()[:16].float()
    (found,) = redundancy.of_activations(torch.nn.Sequential(conv), ["0"], [images]).values()
    assert found.max_abs_corr == pytest.approx(1, abs=1e-3)
    assert found.rank_ratio_99 <= 0.5


def test_a_predicted_accuracy_begins_with_the_measured_one(given, dataset):
    accuracy = predict.accuracies(given, dataset.test)
    assert accuracy(0.0) == pytest.approx(report.evaluate(given, dataset).accuracy.top1, abs=0.01)
    assert predict.accuracies(given, None)(0.1) is None


def test_the_error_of_a_width_is_what_is_measured():
    """Of a network without nonlinearities between the layer and the outputs, on the images that moments are of."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 1), torch.nn.Conv2d(6, 6, 1), torch.nn.Flatten(), torch.nn.Linear(6, 4)
    ).eval()
    given = own(randomise_(model), (3, 1, 1))
    images = torch.randint(0, 256, (256, 3, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    graph, channels = plan(given.module, (3, 1, 1))
    names = [layer.name for layer in layers(graph)]
    batches = moments.Batches(images, given.recipe.preprocessing, moments.value_bytes(graph))
    known = predict.moments(given, given.module, graph, names, batches)
    found = predict.sensitivity(predict.Plain(given.module, graph, channels, known), lambda error: None)["1"]["channels"]
    batch = data.normalise(images, given.recipe.preprocessing)
    with torch.inference_mode():
        wanted, read = given.module(batch).double(), given.module[:2](batch).flatten(1).double()
    weight, spread = given.module[3].weight.detach().double(), wanted - wanted.mean(0)
    read = read - read.mean(0)
    for point in found:
        best = min(
            float((spread - read[:, kept] @ torch.linalg.lstsq(read[:, kept], read @ weight.T).solution).norm() / spread.norm())
            for kept in torch.combinations(torch.arange(6), point["kept"])
        )
        assert 0.8 * best < point["error"] < 1.6 * best + 0.02  # channels are given up one by one, not by trying all choices


@pytest.mark.parametrize("name", methods.names())
def test_a_plan_is_what_compress_does(name, given):
    target = Target(0.6, nearest=True)
    tree = planned(copy.deepcopy(given), name, methods.get(name)(), target)
    made = compress(copy.deepcopy(given), name, methods.get(name)(), target)
    assert tree["after"] == {"params": measure.params(made.module), "macs": measure.macs(made.module, made.input_shape)}
    assert tree["before"] == {"params": measure.params(given.module), "macs": measure.macs(given.module, given.input_shape)}
    changed = [row for row in tree["layers"] if row["before"] != row["after"]]
    assert changed
    assert not any(row["why"].startswith("left") for row in changed)
    assert sum((row["error"] or 0) ** 2 for row in tree["layers"]) == pytest.approx(tree["error"] ** 2)
    assert sum(row["after"]["macs"] for row in tree["layers"]) == tree["after"]["macs"]


@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_prediction_is_of_what_compress_does_to_a_file_of_an_earlier_step(of, given):
    """Of its layers that are made plain for it the ratio is not: it is of the file."""
    earlier = {"params": ("linearconv", 0.6), "macs": ("hetconv", 0.6)}[of]
    small = compress(copy.deepcopy(given), earlier[0], methods.get(earlier[0])(), Target(earlier[1]))
    before = {"params": measure.params(small.module), "macs": measure.macs(small.module, small.input_shape)}
    (row,) = analyse(copy.deepcopy(small), wanted=Predicted(["hinge"], [0.7], of))["predictions"]
    tree = planned(small, "hinge", methods.get("hinge")(), Target(0.7, of))
    assert row["error"] == pytest.approx(tree["error"])
    assert tree["before"] == before
    assert tree["after"][of] <= 0.7 * before[of]


def test_moments_are_taken_once(given, dataset, monkeypatch):
    """All layers from one set, of all the images that are told: no pass over them for each of the layers."""
    seen = []

    def counted(model, names, batches):
        seen.append(sum(map(len, batches)))
        return moments.gather(model, names, batches)

    monkeypatch.setattr(predict, "gather", counted)
    tree = analyse(copy.deepcopy(given), dataset=dataset, wanted=Predicted(["fcf", "hinge"]))
    assert seen == [tree["data"]["images"]]
