"""Any method after any other: kernels are made plain first, every step stays in the recipe, and the file is the network."""

import copy
from functools import cache

import chains
import pytest
import torch
from networks import outputs
from test_artefact import image, network
from test_search import images, settings
from test_train import same, weights

from compactcli import artefact, data, kernels, measure, methods, report
from compactcli.artefact import Network, open_model
from compactcli.compress import Search, Target, compress
from compactcli.finetune import finetune
from compactcli.recipe import Keep, Replace, Share

SHAPE = (3, 16, 16)
KEPT = 0.8

every_pair = pytest.mark.parametrize(("first", "second"), [(a, b) for a in methods.names() for b in methods.names()])


@pytest.fixture(autouse=True)
def short_latency(monkeypatch):
    monkeypatch.setattr(report, "LATENCY_SECONDS", 0.0)


def whole() -> Network:
    return network(shape=SHAPE, width=8, num_classes=3)


@cache
def figures(*names: str) -> dict[str, int]:
    """Of the network that these methods make, one after the other."""
    module = (open_model(made(*names)) if names else whole()).module
    return {"params": measure.params(module), "macs": measure.macs(module, SHAPE)}


def compressed(given: Network, name: str, lines: list[str]) -> bytes:
    """The file of the network that a method makes of it; it computes, bit for bit, what that network does."""
    small = compress(given, name, methods.get(name)(), Target(KEPT), log=lines.append)
    data = artefact.dumps(small)
    assert torch.equal(outputs(open_model(data).module, image(small))[0], outputs(small.module, image(small))[0])
    return data


@cache
def told(*names: str) -> tuple[bytes, str]:
    """The file that these methods make, one after the other, and what the last of them said."""
    lines: list[str] = []
    return compressed(open_model(made(*names[:-1])) if names[1:] else whole(), names[-1], lines), "\n".join(lines)


def made(*names: str) -> bytes:
    return told(*names)[0]


@every_pair
def test_each_step_keeps_its_share_of_what_it_was_given(first, second):
    for start, end, name in ((figures(), figures(first), first), (figures(first), figures(first, second), second)):
        of = methods.get(name).of[0]
        assert 0.7 * start[of] < end[of] <= KEPT * start[of]


@every_pair
def test_both_steps_are_in_the_recipe_with_what_they_did(first, second):
    found = open_model(made(first, second))
    assert [(step.command, step.method) for step in found.recipe.steps] == [("compress", first), ("compress", second)]
    for step in found.recipe.steps:
        assert any(isinstance(edit, Keep | Replace | Share) for edit in step.edits)
    measures = [{"params": step.measures.params, "macs": step.measures.macs} for step in found.recipe.steps]
    assert measures == [figures(first), figures(first, second)]


@every_pair
def test_kernels_are_made_plain_first_and_the_user_is_told(first, second):
    before, after = open_model(made(first)), open_model(made(first, second))
    stored = kernels.layers(before.module)
    plain = [edit.module for edit in after.recipe.steps[1].edits if isinstance(edit, Replace) and edit.layer == "plain.folded"]
    assert sorted(plain) == sorted(stored)
    line = f"{second}: made {len(stored)} layers of an earlier step plain: what it had saved there is undone"
    assert (line in told(first, second)[1]) == bool(stored)
    edits = [edit for edit in after.recipe.steps[1].edits if isinstance(edit, Replace)]
    assert kernels.layers(after.module).keys() <= {edit.module for edit in edits if edit.layer.startswith(f"{second}.")}


@every_pair
def test_a_chained_network_is_run_as_plain_layers(first, second):
    given = open_model(made(first, second))
    plain, x = kernels.folded(given.module), image(given)
    assert not kernels.layers(plain)
    torch.testing.assert_close(outputs(plain, x)[0], outputs(given.module, x)[0], rtol=1e-5, atol=1e-5)


@every_pair
def test_a_report_is_of_both_steps_and_of_the_first_network(first, second):
    given, now = open_model(made(first, second)), figures(first, second)
    tree = report.report(given, whole(), None)
    assert [step["method"] for step in tree["steps"]] == [first, second]
    assert {name: tree["steps"][1][name] for name in ("params", "macs")} == now
    for name, count in figures().items():
        assert tree["model"][name] == now[name]
        assert tree["ratios"][name] == pytest.approx(now[name] / count)
    assert sum(layer["macs"] for layer in tree["layers"]) == tree["model"]["macs"]
    layers = sum(layer["params"] for layer in tree["layers"])
    shared = sum(measure.params(each) for each in kernels.shared(given.module).values())
    norms = [module for module in given.module.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert layers + shared + sum(map(measure.params, norms)) == tree["model"]["params"]


@every_pair
def test_a_chained_network_trains_on(first, second):
    given = open_model(made(first, second))
    before = weights(given.module)
    hooks = methods.attached(given.recipe, given.module)
    earlier, later = given.recipe.steps
    again = {edit.module for edit in later.edits if isinstance(edit, Replace)}
    left = [edit for edit in earlier.edits if not (isinstance(edit, Replace) and edit.module in again)]
    assert [type(hook) for hook in hooks] == [methods.get(name) for name in ([first, second] if left else [second])]
    trained = finetune(given, images(36), settings(epochs=1), keep="last")
    after = weights(trained.module)
    assert before.keys() == after.keys()
    changed = [name for name, _ in trained.module.named_parameters() if not same({name: before[name]}, after)]
    assert len(changed) > 0.9 * len(list(trained.module.named_parameters()))
    assert [step.command for step in open_model(artefact.dumps(trained)).recipe.steps] == ["compress", "compress", "finetune"]


@every_pair
def test_a_search_follows_any_method(first, second):
    """Hooks of the step before meet the layers that the search has made its own, for a while, of those that they train."""
    given = open_model(made(first))
    chosen = settings(epochs=1, batch_size=12)
    target = Target(KEPT, nearest=True)
    searched = compress(given, second, methods.get(second)(), target, search=Search(images(36), chosen))
    assert [step.method for step in searched.recipe.steps] == [first, second]
    again = open_model(artefact.dumps(searched))
    assert torch.equal(outputs(again.module, image(again))[0], outputs(searched.module, image(again))[0])


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("resnet56", "hinge", "csg"), ("resnet20", "hetconv", "linearconv"), ("resnet20", "fcf", "hinge")],
)
def test_methods_chain_on_a_trained_network(checkpoints, name, first, second):
    original = open_model(checkpoints / f"{name}-cifar10jpeg.th")
    twice = open_model(compressed(open_model(compressed(copy.deepcopy(original), first, [])), second, []))
    tree = report.report(twice, original, None)
    assert [step["method"] for step in tree["steps"]] == [first, second]
    for name, before, after in zip((first, second), (tree["baseline"], tree["steps"][0]), tree["steps"], strict=True):
        of = methods.get(name).of[0]
        assert 0.79 < after[of] / before[of] <= KEPT
    plain, x = kernels.folded(twice.module), image(twice)
    torch.testing.assert_close(outputs(plain, x)[0], outputs(twice.module, x)[0], rtol=1e-4, atol=1e-4)
    noise = data.from_tensors(torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10, "train")
    classes = tuple(original.recipe.classes or map(str, range(10)))
    trained = finetune(twice, data.Dataset("noise", False, classes, noise, None), settings(epochs=1), keep="last")
    assert [step.command for step in open_model(artefact.dumps(trained)).recipe.steps] == ["compress", "compress", "finetune"]


@pytest.mark.parametrize("number", range(16))
def test_random_chains_in_random_networks_hold_the_law(number):
    """More of them: python -m benchmarks random_networks."""
    told = chains.held(number)
    assert told.steps or told.refused
