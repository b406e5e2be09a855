"""Tracing tells what runs, in order, and leaves the network as it was."""

import copy
import logging

import networks
import pytest
import torch
from networks import AWKWARD, SHAPE, named, outputs, randomise_
from torch import Tensor, fx, nn

from compactcli.errors import CompactError
from compactcli.graph import run_fake, trace


class Caching(nn.Module):
    """Keeps a tensor on itself in eval mode, as levit and tiny_vit do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = networks.conv(3, 4)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.layer.weight.sum() * 2
        return self.layer(x) * self.cache


def snapshot(model: nn.Module) -> tuple[object, ...]:
    tensors = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return tensors, hooks, [module.training for module in model.modules()]


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("train", [False, True])
def test_tracing_leaves_the_network_as_it_was(name, train):
    model = randomise_(AWKWARD[name]())
    next(model.children()).eval()
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    create_node = fx.Tracer.create_node
    trace(model, SHAPE, train=train)
    run_fake(model, SHAPE, train=train)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert fx.Tracer.create_node is create_node


def test_no_fake_tensor_stays_behind():
    model = Caching().eval()
    trace(model, SHAPE)
    assert model.cache is None
    image = torch.randn(2, *SHAPE)
    first = outputs(model, image)
    trace(model, SHAPE)
    assert torch.equal(outputs(model, image)[0], first[0])


def test_every_operation_knows_its_module():
    model = nn.Sequential(networks.conv(3, 4), networks.Code(lambda s, x: s.inner(x) + 1, inner=nn.ReLU()), *networks.head(4))
    graph = trace(model, SHAPE)
    owners = {node.target.overloadpacket.__name__: owner for node, owner in graph.owners.items() if node.op == "call_function"}
    assert (owners["convolution"], owners["relu"], owners["add"], owners["addmm"]) == ("0", "1.inner", "1", "4")


def test_every_tensor_is_a_placeholder():
    model = named("cifar:resnet8", width=4)
    graph = trace(model, (3, 32, 32))
    assert list(graph.tensors.values()) == [*dict(model.named_parameters()), *dict(model.named_buffers())]
    for node, name in graph.tensors.items():
        assert node.meta["val"].shape == model.state_dict()[name].shape


@pytest.mark.parametrize("name", AWKWARD)
def test_the_operations_compute_what_the_network_does(name):
    """What is written in place, through views as well, is among them: calibration runs them one by one."""
    model = randomise_(AWKWARD[name]()).eval()
    graph = trace(model, SHAPE)
    image = torch.randn(graph.image.meta["val"].shape)
    values = {**graph.constants, graph.image: image.clone()}
    values.update({node: model.state_dict(keep_vars=True)[tensor] for node, tensor in graph.tensors.items()})
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function":
                values[node] = node.target(*fx.node.map_arg(node.args, values.get), **fx.node.map_arg(node.kwargs, values.get))
    results = [values[node] for node in graph.nodes[-1].all_input_nodes]
    expected = outputs(model, image)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_the_mode_is_the_one_asked_for():
    model = nn.Sequential(networks.conv(3, 4), nn.Dropout(0.5))
    for module_mode in (True, False):
        model.train(module_mode)
        names = [[str(node.target) for node in trace(model, SHAPE, train=train).nodes] for train in (False, True)]
        assert not any("bernoulli" in name or "dropout" in name for name in names[0])
        assert any("bernoulli" in name or "dropout" in name for name in names[1])


def test_a_wrapped_network_is_unwrapped():
    model = networks.concatenation()
    assert list(trace(nn.DataParallel(model), SHAPE).tensors.values()) == list(trace(model, SHAPE).tensors.values())


def test_nothing_is_allocated():
    """The weight alone would take 4 TB."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1 << 20), nn.Linear(1 << 20, 1 << 20))
    graph = trace(model, SHAPE)
    assert graph.nodes[-1].all_input_nodes[0].meta["val"].shape == (2, 1 << 20)
    run_fake(model, SHAPE)


@pytest.mark.parametrize("work", [trace, run_fake])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(networks.conv(3, 4), networks.conv(5, 4)), "expected input.* to have 5 channels, but got 4"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 2)), "mat1 and mat2|reduction dim"),
    ],
    ids=["widths", "input"],
)
def test_what_does_not_run_is_said_in_one_line(work, model, message):
    create_node = fx.Tracer.create_node
    with pytest.raises(CompactError, match=message) as caught:
        work(model, SHAPE)
    assert "\n" not in str(caught.value)
    assert fx.Tracer.create_node is create_node
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_message_names_the_mode_and_the_shape():
    model = networks.Code(lambda s, x: x.view(3, 3) if s.training else x)
    run_fake(model, SHAPE)
    with pytest.raises(CompactError, match="does not run in train mode"):
        run_fake(model, SHAPE, train=True)
    with pytest.raises(CompactError, match=r"does not run on images of shape \(3, 8, 8\)"):
        trace(model, SHAPE, train=True)


def test_statistics_stay_in_train_mode():
    model = nn.Sequential(networks.conv(3, 4), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    run_fake(model, SHAPE, train=True)
    trace(model, SHAPE, train=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_callers_logging_stays_as_it_was():
    """A library must not switch on what its user switched off."""
    logging.disable(logging.INFO)
    try:
        trace(nn.Conv2d(3, 4, 3), (3, 8, 8))
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", networks.VALUE_DEPENDENT)
@pytest.mark.parametrize("train", [False, True])
def test_code_that_depends_on_values_runs_on_random_images_and_leaves_the_network_as_it_was(name, train):
    model = randomise_(networks.VALUE_DEPENDENT[name]())
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    graph = trace(model, SHAPE, train=train)
    run_fake(model, SHAPE, train=train)
    assert graph.baked
    assert not trace(networks.concatenation(), SHAPE).baked
    assert [str(node.target) for node in graph.nodes] == [str(node.target) for node in trace(model, SHAPE, train=train).nodes]
    assert snapshot(model) == before
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())


def test_a_script_module_with_parameters_is_refused():
    model = nn.Sequential(networks.conv(3, 8), networks.script(networks.conv(8, 6)))
    with pytest.raises(CompactError, match="1 is a ScriptModule, whose layers cannot be changed"):
        trace(model, SHAPE)
