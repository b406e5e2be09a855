"""What a network is, was and became: keys and figures of the JSON, and tables for people."""

import copy
import io
import json
import math
from dataclasses import replace

import networks
import pytest
import torch
from networks import named, randomise_
from rich.console import Console
from test_artefact import network, smaller
from test_compress import own

from compactcli import artefact, counters, data, kernels, latency, measure, methods, report, sources, tables
from compactcli.analysis import analyse
from compactcli.artefact import Wishes, open_model
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.explain import explanation
from compactcli.markdown import report_markdown
from compactcli.page import document, report_page
from compactcli.recipe import Measures, Preprocessing, Replace

# DESIGN.md, "JSON, stable within a major version": every key, and no other.
MODEL = {
    *(
        "arch",
        "input_shape",
        "params",
        "params_materialised",
        "params_without_shared",
        "macs",
        "macs_synthesis",
        "flops",
        "thop_macs",
    ),
    *("size_bytes", "latency_ms", "accuracy", "evaluated", "sha256"),
}
REPORT = {"schema", "model", "baseline", "ratios", "accuracy_delta", "steps", "layers"}
STEP = {"command", "method", "options", "params", "macs", "accuracy", "error", "version"}
CHANGED_LAYER = {"name", "type", "before", "after", "params", "macs"}
ANALYSIS = {"schema", "model", "data", "layers", "sets", "predictions", "suggestion"}
LAYER = {
    *("name", "type", "weight_shape", "params", "macs", "sets", "locked", "redundancy"),
    *("time", "activations", "sensitivity"),
}
REDUNDANCY = {"max_abs_corr", "mean_abs_corr", "effective_rank", "rank_ratio_99"}
BENCH = {"schema", "device", "processor", "torch", "input_shape", "models"}
LATENCY = {
    *("batch", "threads", "memory_format", "median_ms", "iqr_ms", "images_per_second", "runs", "peak_memory_bytes", "ratio"),
}
EVALUATION = {"schema", "accuracy", "accuracy_top5", "loss", "images", "dataset", "split", "model"}


@pytest.fixture(autouse=True)
def short_latency(monkeypatch):
    monkeypatch.setattr(report, "LATENCY_SECONDS", 0.01)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(original, small), as read from files."""
    folder = tmp_path_factory.mktemp("pair")
    torch.save(named("cifar:resnet8", width=8, in_channels=1).state_dict(), folder / "original.pt")
    original = open_model(folder / "original.pt")
    artefact.save(smaller(open_model(folder / "original.pt"), 0.5), str(folder / "small.safetensors"))
    return original, open_model(folder / "small.safetensors")


@pytest.fixture(scope="module")
def digits():
    return sources.open_dataset("digits", input_shape=(1, 32, 32), preprocessing=Preprocessing((0.5,), (0.5,)), limit=50)


def text_of(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(renderable)
    return stream.getvalue()


def check_report(tree: dict) -> None:
    assert set(tree) == REPORT
    assert tree["schema"] == "compactcli/report/1"
    assert set(tree["model"]) == MODEL
    assert tree["baseline"] is None or set(tree["baseline"]) == MODEL
    assert set(tree["ratios"]) == {"params", "macs", "size_bytes", "latency"}
    assert all(set(step) == STEP for step in tree["steps"])
    assert all(set(layer) == CHANGED_LAYER for layer in tree["layers"])
    for part in (tree["model"], tree["baseline"]):
        assert part is None or part["evaluated"] is None or set(part["evaluated"]) == {"dataset", "split", "images"}
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree


def test_a_report_on_a_small_network(pair):
    original, small = pair
    tree = report.report(small, None, None)
    check_report(tree)
    model, first = tree["model"], tree["baseline"]
    assert model["arch"] == "cifar:resnet8"
    assert model["input_shape"] == [1, 32, 32]
    assert model["params"] == model["params_materialised"] == sum(p.numel() for p in small.module.parameters())
    assert model["flops"] == 2 * model["macs"] == 2 * measure.macs(small.module, (1, 32, 32))
    assert model["macs_synthesis"] == 0
    assert model["thop_macs"] > 0
    assert model["size_bytes"] == len(artefact.dumps(small))
    assert model["latency_ms"] > 0
    assert model["sha256"] == small.sha256
    assert (model["accuracy"], model["evaluated"], tree["accuracy_delta"]) == (None, None, None)
    assert first["params"] == sum(p.numel() for p in original.module.parameters())
    assert first["macs"] == measure.macs(original.module, (1, 32, 32))
    assert (first["size_bytes"], first["sha256"]) == (original.size_bytes, original.sha256)
    for key in ("params", "macs", "size_bytes"):
        assert tree["ratios"][key] == model[key] / first[key]
    assert tree["ratios"]["macs"] <= 0.5
    assert tree["ratios"]["latency"] is None  # nobody can measure what is not there
    (step,) = tree["steps"]
    assert (step["command"], step["method"], step["options"]["ratio"]) == ("compress", "hinge", 0.5)
    assert (step["params"], step["macs"]) == (model["params"], model["macs"])


def test_a_report_beside_the_original(pair, digits):
    original, small = pair
    tree = report.report(small, original, digits)
    check_report(tree)
    assert tree["baseline"]["latency_ms"] > 0
    assert tree["ratios"]["latency"] == tree["model"]["latency_ms"] / tree["baseline"]["latency_ms"]
    assert tree["model"]["evaluated"] == tree["baseline"]["evaluated"] == {"dataset": "digits", "split": "test", "images": 50}
    assert tree["accuracy_delta"] == tree["model"]["accuracy"] - tree["baseline"]["accuracy"]


def test_the_original_among_the_networks_is_what_the_others_are_compared_with(pair, digits):
    """As measured now, in whichever place: the recipe knows neither its latency nor its accuracy on these images."""
    original, small = pair
    for both in ([original, small], [small, original]):
        trees = report.described(both, None, [digits, digits])
        whole, own = trees[both.index(original)], trees[both.index(small)]
        assert own["baseline"] == whole["model"]
        assert own["ratios"]["latency"] == own["model"]["latency_ms"] / whole["model"]["latency_ms"]
        assert own["accuracy_delta"] == own["model"]["accuracy"] - whole["model"]["accuracy"]
        assert whole["baseline"]["latency_ms"] is None  # it came from nowhere else


def test_a_baseline_of_another_input_is_refused(pair):
    """Its MACs and its time would be of other work."""
    small = pair[1]
    with pytest.raises(CompactError, match=r"random: takes 3x32x32, small\.safetensors 1x32x32; compare networks of one input"):
        report.report(small, network(width=4), None)


def test_layers_add_up(pair):
    _, small = pair
    tree = report.report(small, None, None)
    assert sum(layer["macs"] for layer in tree["layers"]) == tree["model"]["macs"]
    assert sum(layer["before"]["macs"] for layer in tree["layers"]) == tree["baseline"]["macs"]
    norms = sum(p.numel() for m in small.module.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    assert sum(layer["params"] for layer in tree["layers"]) + norms == tree["model"]["params"]
    for layer in tree["layers"]:
        assert (layer["params"], layer["macs"]) == (layer["after"]["params"], layer["after"]["macs"])
        assert layer["after"]["macs"] <= layer["before"]["macs"]
        assert len(layer["before"]["weight_shapes"]) == 1


def test_a_decomposed_layer_is_two_in_the_place_of_one():
    small = smaller(network(width=8), 0.6, "decompose")
    layers = report.report(small, None, None)["layers"]
    assert any(len(layer["after"]["weight_shapes"]) == 2 for layer in layers)
    assert {len(layer["before"]["weight_shapes"]) for layer in layers} == {1}


def test_a_network_without_history_is_its_own_first(pair):
    original, _ = pair
    tree = report.report(original, None, None)
    check_report(tree)
    assert tree["steps"] == []
    assert tree["ratios"]["params"] == tree["ratios"]["macs"] == tree["ratios"]["size_bytes"] == 1
    assert all(layer["before"] == layer["after"] for layer in tree["layers"])


def test_a_network_that_was_never_read_has_no_first():
    tree = report.report(network(width=4), None, None)
    check_report(tree)
    assert tree["baseline"] is None
    assert set(tree["ratios"].values()) == {None}
    assert tree["model"]["size_bytes"] is tree["model"]["sha256"] is None


def test_the_last_recorded_accuracy_is_shown_without_data(pair):
    _, small = pair
    last = small.recipe.steps[-1]
    seen = {"dataset": "digits", "split": "test", "images": 7}
    measures = Measures(last.measures.params, last.measures.macs, None, 91.5, seen)
    recorded = replace(small, recipe=small.recipe.then(replace(last, command="finetune", measures=measures)))
    tree = report.report(recorded, None, None)
    check_report(tree)
    assert (tree["model"]["accuracy"], tree["model"]["evaluated"]) == (91.5, seen)
    assert "91.50 %" in text_of(tables.report_tables(tree))


def test_the_history_knows_the_accuracy_of_the_baseline_that_it_began_with(pair):
    original, small = pair
    seen = {"dataset": "digits", "split": "test", "images": 7}
    source = small.recipe.source
    known = replace(source, measures=replace(source.measures, accuracy=90.5, evaluated=seen))
    tree = report.report(replace(small, recipe=replace(small.recipe, source=known)), original, None)
    check_report(tree)
    assert (tree["baseline"]["accuracy"], tree["baseline"]["evaluated"]) == (90.5, seen)
    assert tree["baseline"]["latency_ms"] > 0
    other = replace(known, sha256="0" * 64)
    assert (
        report.report(replace(small, recipe=replace(small.recipe, source=other)), original, None)["baseline"]["accuracy"] is None
    )


@pytest.mark.parametrize("other", [{"dataset": "digits", "split": "test", "images": 7}, None])
def test_accuracies_on_other_images_are_not_compared(pair, digits, other):
    """Only of the same images is there a difference, and all that people read says what each was measured on."""
    original, small = pair
    judged = report.evaluate(original, digits)
    for evaluated, alike in ((judged.to_json(), True), (other, False)):
        source = small.recipe.source
        known = replace(source, measures=replace(source.measures, accuracy=90.5, evaluated=evaluated))
        recalled = replace(small, recipe=replace(small.recipe, source=known))
        tree = report.report(recalled, None, digits)
        check_report(tree)
        assert tree["baseline"]["accuracy"] == 90.5
        assert tree["accuracy_delta"] == (tree["model"]["accuracy"] - 90.5 if alike else None)
        told = f"the original's on {'7 test images of digits' if other else 'images that are not known'}"
        page = report_page(document(tree, recalled, None, None)).replace("&#39;", "'").replace("&#x27;", "'")
        for text in (text_of(tables.report_tables(tree)), report_markdown(tree), page):
            assert (told in " ".join(text.split())) is not alike


def test_tables_show_a_dash_for_what_is_not_known(pair):
    original, small = pair
    text = text_of(tables.report_tables(report.report(small, None, None), layers=True))
    for word in (
        "Parameters",
        "MACs",
        "FLOPs",
        "File",
        "Latency",
        "Accuracy",
        "history",
        "layers that changed",
        "--method hinge",
    ):
        assert word in text
    assert "None" not in text
    assert "nan" not in text
    accuracy = next(line for line in text.splitlines() if "Accuracy" in line)
    assert accuracy.count("-") == 3
    assert f"{sum(p.numel() for p in original.module.parameters()):,}" in text
    assert "None" not in text_of(tables.report_tables(report.report(network(width=4), None, None), layers=True))


def test_a_papers_own_count_is_there_when_asked_for(pair):
    original, small = pair
    tree = report.report(small, original, None, counter="fcf")
    assert set(tree) == REPORT | {"counter"}
    before, now = (counters.fcf(each.module, (1, 32, 32)) for each in pair)
    assert tree["counter"] == {"name": "fcf", "count": now, "baseline": before}
    assert now < before
    row = next(line for line in text_of(tables.report_tables(tree)).splitlines() if "By fcf's counter" in line)
    assert all(figure in row for figure in (f"{before:,}", f"{now:,}", f"{100 * now / before:.1f} %"))


def test_a_papers_own_count_of_the_first_network_needs_its_file(pair):
    _, small = pair
    tree = report.report(small, None, None, counter="hinge")
    assert tree["counter"] == {"name": "hinge", "count": counters.hinge(small.module, (1, 32, 32)), "baseline": None}
    row = next(line for line in text_of(tables.report_tables(tree)).splitlines() if "By hinge's counter" in line)
    assert row.count("-") == 2


# Layers that make their kernels


@pytest.fixture(scope="module", params=["linearconv", "csg"])
def kerneled(request, tmp_path_factory):
    """(original, network whose kernels are stored as fewer numbers), as read from files."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(named("cifar:resnet8", width=16, in_channels=1).state_dict(), folder / "original.pt")
    kind = methods.get(request.param)
    made = compress(open_model(folder / "original.pt"), request.param, kind(), Target(0.5))
    artefact.save(made, str(folder / "made.safetensors"))
    return open_model(folder / "original.pt"), open_model(folder / "made.safetensors")


def synthesis(original, made) -> int:
    """Multiply-accumulates to make the kernels, from the recipe's numbers alone."""
    total = 0
    for edit in made.recipe.edits:
        if isinstance(edit, Replace):
            outputs, *reads = original.module.get_parameter(f"{edit.module}.weight").shape
            numbers, size = dict(edit.options), math.prod(reads)
            if edit.layer == "csg.coded":
                slices = math.ceil(outputs / numbers["outputs"]) * math.ceil(reads[0] / numbers["inputs"])
                total += slices * numbers["code"] * numbers["outputs"] * numbers["inputs"] * reads[1] * reads[2]
            else:
                primary, rest = numbers["primary"], outputs - numbers["primary"]
                rank = numbers.get("rank")
                product = rest * primary if rank is None else rank * (rest + primary)
                total += size * numbers.get("kept", product)
    return total


def test_the_figures_of_kernels_that_are_made(kerneled):
    original, made = kerneled
    shape = (1, 32, 32)
    trees = [report.report(made, None, None), report.report(made, original, None)]
    for tree in trees:
        check_report(tree)
        model, first = tree["model"], tree["baseline"]
        assert model["params"] == sum(p.numel() for p in made.module.parameters()) <= 0.5 * first["params"]
        assert model["params_materialised"] == first["params"] == first["params_materialised"] == measure.params(original.module)
        assert model["macs"] == first["macs"] == measure.macs(original.module, shape)
        assert model["macs_synthesis"] == synthesis(original, made) > 0
        assert (first["macs_synthesis"], first["params_without_shared"]) == (0, None)
        assert model["thop_macs"] == measure.thop_macs(original.module, shape)
        generator = [p.numel() for name, p in made.module.named_parameters() if name.startswith("compactcli_shared.")]
        assert model["params_without_shared"] == (model["params"] - sum(generator) if generator else None)
    keys = set(MODEL) - {"thop_macs", "latency_ms"}
    described = [analyse(made)["model"], report.bench([made], repeats=2)["models"][0]["model"]]
    for other in described:
        assert {key: other[key] for key in keys} == {key: trees[0]["model"][key] for key in keys}


def test_layers_that_make_their_kernels_add_up(kerneled):
    original, made = kerneled
    tree = report.report(made, None, None)
    assert sum(layer["macs"] for layer in tree["layers"]) == tree["model"]["macs"]
    norms = sum(p.numel() for m in made.module.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    stored = tree["model"]["params_without_shared"] or tree["model"]["params"]
    assert sum(layer["params"] for layer in tree["layers"]) + norms == stored
    layers = {layer["name"]: layer for layer in tree["layers"]}
    changed = kernels.layers(made.module)
    for name, layer in changed.items():
        weight = original.module.get_parameter(f"{name}.weight")
        assert layers[name]["type"] == "Conv2d"
        assert layers[name]["before"]["weight_shapes"] == layers[name]["after"]["weight_shapes"] == [list(weight.shape)]
        assert layers[name]["before"]["params"] == weight.numel()
        assert layers[name]["params"] == sum(p.numel() for p in layer.parameters()) < weight.numel()
    assert {name for name, layer in layers.items() if layer["before"] != layer["after"]} == set(changed)
    text = text_of(tables.report_tables(tree, layers=True))
    assert all(name in text for name in changed)


def test_tables_show_what_kernels_are_made_of_where_they_are(kerneled, pair):
    original, made = kerneled
    text = text_of(tables.report_tables(report.report(made, None, None)))
    assert f"{measure.params(original.module):,}" in next(
        line for line in text.splitlines() if "Parameters, kernels made" in line
    )
    assert f"{synthesis(original, made):,}" in next(line for line in text.splitlines() if "MACs to make kernels, once" in line)
    assert ("Parameters, but for shared ones" in text) == bool(kernels.shared(made.module))
    assert "None" not in text
    text = text_of(tables.report_tables(report.report(pair[1], None, None, counter="hinge")))
    assert not any(word in text for word in ("kernels", "shared"))
    labels = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert labels[:7] == ["Parameters", "MACs", "FLOPs", "By hinge's counter", "File", "Latency", "Accuracy"]


def test_what_is_timed_is_what_load_gives(kerneled, monkeypatch):
    timed = []
    own = latency.of
    monkeypatch.setattr(latency, "of", lambda modules, *a, **k: timed.extend(modules) or own(modules, *a, **k))
    report.report(kerneled[1], kerneled[0], None)
    report.bench([kerneled[1]], repeats=2)
    assert len(timed) == 3
    assert not any(kernels.layers(module) for module in timed)
    assert kernels.layers(kerneled[1].module)  # left as it was


def test_an_evaluation_of_kernels_that_are_made(kerneled, digits):
    _, made = kerneled
    tree = report.evaluation(made, report.evaluate(made, digits))
    assert set(tree["model"]) == MODEL
    assert tree["model"]["macs_synthesis"] == kernels.synthesis_macs(made.module) > 0
    assert tree["model"]["params_materialised"] > tree["model"]["params"]


def test_an_analysis_of_kernels_that_are_made(kerneled):
    """It is of the plain network that they make."""
    original, made = kerneled
    layers = analyse(made)["layers"]
    assert [(each["name"], each["weight_shape"], each["macs"], each["sets"]) for each in layers] == [
        (each["name"], each["weight_shape"], each["macs"], each["sets"]) for each in analyse(original)["layers"]
    ]
    name = next(iter(kernels.layers(made.module)))
    assert explanation(made, name) == explanation(original, name)


def test_the_classes_of_a_network_that_ends_with_a_kernel_that_is_made():
    plain = torch.nn.Sequential(networks.conv(3, 16), torch.nn.ReLU(), networks.conv(16, 12))
    given = own(randomise_(torch.nn.Sequential(plain, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())))
    for name in ("linearconv", "csg"):
        made = compress(copy.deepcopy(given), name, methods.get(name)(), Target(0.5, nearest=True))
        assert isinstance(made.module[0][2], kernels.KernelLayer)
        assert made.num_classes == 12


# Analysis


@pytest.mark.parametrize("linear", [False, True])
def test_an_analysis(linear):
    given = network(width=8)
    tree = analyse(given, linear=linear)
    assert set(tree) == ANALYSIS
    assert tree["schema"] == "compactcli/analysis/1"
    assert set(tree["model"]) == MODEL
    assert set(tree["suggestion"]) == {"method", "ratio", "command"}
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    layers = {layer["name"]: layer for layer in tree["layers"]}
    assert all(set(layer) == LAYER for layer in layers.values())
    assert list(layers) == [
        name for name, m in given.module.named_modules() if hasattr(m, "weight") and not name.rpartition(".")[2].startswith("bn")
    ]
    for name, layer in layers.items():
        known = linear or layer["type"] == "Conv2d"
        assert (layer["redundancy"] is not None) == known, name
        assert not known or set(layer["redundancy"]) == REDUNDANCY
        assert (layer["sets"] == 0) == (layer["locked"] is not None)
        assert layer["weight_shape"] == list(given.module.get_submodule(name).weight.shape)
        assert layer["params"] == sum(p.numel() for p in given.module.get_submodule(name).parameters())
    assert layers["linear"]["locked"] == "the network's output"
    assert layers["layer1.0.conv1"]["sets"] == 8
    assert sum(layer["macs"] for layer in tree["layers"]) == tree["model"]["macs"] == measure.macs(given.module, (3, 32, 32))


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_are_those_of_the_plain_one(groups):
    """One and the same map of a 1 x 1 convolution, written either way, is as redundant."""
    plain = torch.nn.Conv2d(8, 12, 1, groups=groups, bias=False)
    turned = torch.nn.ConvTranspose2d(8, 12, 1, groups=groups, bias=False)
    weight = plain.weight.detach().unflatten(0, (groups, -1))
    turned.weight.data = weight.transpose(1, 2).flatten(0, 1)
    image = torch.randn(2, 8, 5, 5)
    assert torch.allclose(plain(image), turned(image), atol=1e-6)
    ends = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(12, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    found = [analyse(own(torch.nn.Sequential(ends[0], layer, *ends[1:])))["layers"][1] for layer in (plain, turned)]
    assert found[0]["redundancy"] == pytest.approx(found[1]["redundancy"])


def test_the_suggestion_works():
    for redundant in (False, True):
        given = network(width=16)
        if redundant:
            for module in given.module.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight.data[1:] = module.weight.data[:1]
        suggestion = analyse(given)["suggestion"]
        assert 0.3 <= suggestion["ratio"] <= 0.8
        assert (suggestion["ratio"] == 0.3) == redundant
        assert suggestion["command"] == f"compactcli compress random --method hinge --ratio {suggestion['ratio']:g}"
        smaller(given, suggestion["ratio"])


def test_tables_of_an_analysis_say_why():
    given = own(randomise_(networks.rolled()))
    text = text_of(tables.analysis_tables(analyse(given)))
    assert "channels shifted by a number in code" in text
    assert "the network's output" in text
    assert "try: compactcli compress own --method hinge --ratio" in text


def test_a_network_of_linear_layers_only():
    given = own(
        randomise_(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)))
    )
    tree = analyse(given)
    assert [layer["redundancy"] for layer in tree["layers"]] == [None, None]
    text_of(tables.analysis_tables(tree))


# Evaluation


def test_an_evaluation(pair, digits):
    _, small = pair
    found = report.evaluate(small, digits, batch_size=7)
    tree = report.evaluation(small, found)
    assert set(tree) == EVALUATION
    assert tree["schema"] == "compactcli/evaluation/1"
    assert (tree["dataset"], tree["split"], tree["images"]) == ("digits", "test", 50)
    images = data.normalise(digits.test.images(), small.recipe.preprocessing)
    with torch.no_grad():
        right = small.module(images).argmax(1) == data.labels_of(digits.test)
    assert tree["accuracy"] == pytest.approx(100 * float(right.double().mean()))
    assert tree["accuracy"] <= tree["accuracy_top5"] <= 100
    assert report.evaluate(small, digits).accuracy.loss == pytest.approx(found.accuracy.loss, rel=1e-5)


def test_every_document_describes_a_model_with_the_same_keys(pair, digits):
    _, small = pair
    assert set(report.evaluation(small, report.evaluate(small, digits))["model"]) == MODEL


def test_training_images_are_named_where_there_are_no_others(pair, digits):
    only = data.Dataset("mine", False, None, digits.train, None)
    assert report.evaluate(pair[1], only).to_json() == {"dataset": "mine", "split": "train", "images": 50}


def test_other_classes_and_no_labels_are_refused(pair, digits):
    three = open_model(artefact.dumps(network(width=4, shape=(1, 32, 32), in_channels=1, num_classes=3)))
    with pytest.raises(CompactError, match="3"):
        report.evaluate(three, digits)
    unlabelled = data.Dataset("mine", False, None, data.from_tensors(digits.train.images(), None, "all"), None)
    with pytest.raises(CompactError, match="label"):
        report.evaluate(pair[1], unlabelled)


# Bench


def check_bench(tree: dict) -> None:
    assert set(tree) == BENCH
    assert tree["schema"] == "compactcli/bench/1"
    for each in tree["models"]:
        assert set(each) == {"name", "model", "latency"}
        assert set(each["model"]) == MODEL
        assert all(set(own) == LATENCY for own in each["latency"])
        assert all(own["median_ms"] > 0 and own["iqr_ms"] >= 0 and own["runs"] >= 2 for own in each["latency"])
    assert all(own["ratio"] == 1 for own in tree["models"][0]["latency"])
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree


def test_a_bench_of_a_pair_in_either_order(pair):
    """Every model at every setting; the order decides whose ratio is one, and nothing else."""
    original, small = pair
    one = report.bench([original, small], batches=[1, 3], repeats=2)
    other = report.bench([small, original], batches=[1, 3], repeats=2)
    for tree in (one, other):
        check_bench(tree)
        assert all([own["batch"] for own in each["latency"]] == [1, 3] for each in tree["models"])
        first, second = tree["models"]
        for mine, yours in zip(first["latency"], second["latency"], strict=True):
            assert yours["ratio"] == yours["median_ms"] / mine["median_ms"]
    assert [each["model"] for each in one["models"]] == [each["model"] for each in reversed(other["models"])]
    assert one["models"][1]["model"]["macs"] == small.recipe.steps[-1].measures.macs


def test_settings_are_every_batch_at_every_number_of_threads(pair):
    before = torch.get_num_threads()
    tree = report.bench([pair[1]], batches=[2, 1], threads=[before + 1, before], repeats=2)
    settings = [(own["batch"], own["threads"]) for own in tree["models"][0]["latency"]]
    assert settings == [(2, before + 1), (2, before), (1, before + 1), (1, before)]
    assert torch.get_num_threads() == before


def test_a_bench_takes_another_input_shape(pair):
    tree = report.bench([pair[0]], input_shape=(1, 48, 64), repeats=2)
    assert tree["input_shape"] == tree["models"][0]["model"]["input_shape"] == [1, 48, 64]
    assert tree["models"][0]["model"]["macs"] > pair[0].recipe.source.measures.macs


def test_a_bench_of_networks_that_cannot_be_compared_names_the_way_out(pair):
    colour = network(width=4)
    with pytest.raises(CompactError, match=r"random: takes 3x32x32, original\.pt 1x32x32; give both one with --input-shape"):
        report.bench([pair[0], colour])
    with pytest.raises(CompactError, match=r"random: .*does not run.*; try another --input-shape or --batch-size"):
        report.bench([pair[0], colour], input_shape=(1, 32, 32))


def test_a_table_has_a_row_for_every_model_and_setting(pair):
    tree = report.bench([*pair], batches=[1, 3], repeats=2)
    text = text_of(tables.bench_table(tree))
    assert all(text.count(f"│ {each.name} ") == 2 for each in pair)
    assert "memory" not in text
    assert "input 1x32x32" in text
    tree["models"][0]["name"] = "[red]net.pt"  # a file's name is no markup
    assert text_of(tables.bench_table(tree)).count("[red]net.pt") == 2
    tree["models"][0]["latency"][0]["peak_memory_bytes"] = 12_345
    assert "12,345 B" in text_of(tables.bench_table(tree))
    assert "None" not in text_of(tables.bench_table(tree))


def test_a_file_of_someone_elses_factory_can_be_reported_on(tmp_path):
    """Its first network cannot be built again from the name alone; the layers show what is there."""
    (tmp_path / "mine.py").write_text("from test_artefact import Tied as make\n")
    given = artefact.fresh(Wishes(f"{tmp_path / 'mine.py'}:make", input_shape=(3, 8, 8)), 0)
    randomise_(given.module)
    check_report(report.report(given, None, None))


def test_the_layers_of_someone_elses_factory_are_those_that_it_builds(tmp_path):
    """With the factory as of any other network; without it nothing is told of what layers were."""
    known, factory = named("cifar:resnet8", width=8), tmp_path / "mine.py"
    factory.write_text("from compactcli.cifar import NETWORKS\ndef make(): return NETWORKS['resnet8'](width=8)\n")
    torch.save(known.state_dict(), tmp_path / "net.pt")
    arch, shape = f"{factory}:make", (3, 32, 32)
    found = {}
    for name, wishes in (("own", Wishes(arch, input_shape=shape)), ("ours", Wishes("cifar:resnet8", {"width": 8}, shape))):
        target = tmp_path / f"{name}.safetensors"
        artefact.save(smaller(open_model(tmp_path / "net.pt", wishes), 0.5), str(target))
        found[name] = open_model(target, Wishes(arch) if name == "own" else None)
    tree, wanted = report.report(found["own"], None, None, arch=arch), report.report(found["ours"], None, None)
    assert tree["layers"] == wanted["layers"]
    assert any(layer["before"] != layer["after"] for layer in tree["layers"])
    blind = report.report(found["own"], None, None)
    assert [layer["before"] for layer in blind["layers"]] == [None] * len(blind["layers"])
    assert "layers that changed" not in text_of(tables.report_tables(blind, layers=True))
    page = report_page(document(blind, found["own"], None, None))
    assert "layers changed" not in page
    assert "layers changed" in report_page(document(tree, found["own"], None, None))
