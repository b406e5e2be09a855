"""What goes with a layer's channels: every position of the channel analysis, once, with its reason."""

import pytest
from test_report import text_of

from compactcli.artefact import Wishes, fresh
from compactcli.channels import find
from compactcli.errors import UsageError
from compactcli.explain import explanation, explanation_tables
from compactcli.graph import trace
from compactcli.layers import layers

NETWORKS = ["cifar:resnet8", "cifar:vgg11", "cifar:mobilenet_v2"]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_accounts_for_every_channel(name):
    """Sets times what one takes is what the analysis has, on both sides of every layer."""
    network = fresh(Wishes(name), 0)
    graph = trace(network.module, network.input_shape)
    channels = find(graph, network.module)
    every = layers(graph)
    for layer in every[:: max(3, len(every) // 6)]:
        tree = explanation(network, layer.name)
        for side, at in (("outputs", layer.out_axis), ("inputs", layer.in_axis)):
            groups, numbers = tree[side], channels.axes[layer.weight, at].tolist()
            own = {"tensor": layer.weight, "side": side}
            taken = [
                group["sets"] * each["channels"] for group in groups for each in group["together"] if own.items() <= each.items()
            ]
            assert sum(taken) == len(numbers)
            assert sum(group["sets"] for group in groups) == len(set(numbers))
            assert {group["locked"] for group in groups} == {channels.locked.get(number) for number in numbers}


def test_a_filter_goes_with_its_batch_norm_and_its_reader():
    network = fresh(Wishes("cifar:resnet8"), 0)
    (group,) = explanation(network, "layer1.0.conv1")["outputs"]
    assert group["locked"] is None
    assert {each["tensor"]: each["side"] for each in group["together"]} == {
        "layer1.0.conv1.weight": "outputs",
        "layer1.0.bn1.weight": "channels",
        "layer1.0.bn1.bias": "channels",
        "layer1.0.bn1.running_mean": "channels",
        "layer1.0.bn1.running_var": "channels",
        "layer1.0.conv2.weight": "inputs",
    }


def test_the_table_gives_the_reason():
    network = fresh(Wishes("cifar:resnet8"), 0)
    (group,) = explanation(network, "linear")["outputs"]
    assert group["locked"]
    assert group["locked"] in text_of(explanation_tables(explanation(network, "linear"))).replace("\n", " ")


def test_a_layer_that_is_not_there_is_one_line_with_the_nearest():
    network = fresh(Wishes("cifar:resnet8"), 0)
    with pytest.raises(UsageError, match=r"--explain layer1.0.conv3: .*did you mean layer1\.0\.conv"):
        explanation(network, "layer1.0.conv3")
