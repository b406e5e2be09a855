"""Which channels go together, which are locked and why, and the edits that take some away."""

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import AWKWARD, SHAPE, named, removable
from torch import nn

from compactcli import channels
from compactcli.channels import BY_NUMBERS, INPUT, OUTPUT, Channels
from compactcli.graph import trace
from compactcli.recipe import Keep, Set


def found(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Channels:
    return channels.find(trace(model, shape), model)


def reason(sets: Channels, tensor: str, axis: int = 0) -> str | None:
    return sets.reason((tensor, axis))


@pytest.mark.parametrize("name", AWKWARD)
def test_every_position_of_every_parameter_is_in_one_set(name):
    model = AWKWARD[name]()
    sets = found(model)
    shapes = {key: tuple(t.shape) for key, t in [*model.named_parameters(), *model.named_buffers()]}
    assert {axis: len(ids) for axis, ids in sets.axes.items()} == {
        (key, axis): size for key, shape in shapes.items() for axis, size in enumerate(shape)
    }
    numbers = {int(n) for ids in [*sets.axes.values(), *(slot.sets for slot in sets.slots)] for n in ids}
    assert numbers == set(range(sets.count))
    assert sorted([*sets.free(), *sets.locked]) == list(range(sets.count))
    assert sets.consumed <= set(sets.axes)


def test_a_chain():
    model = nn.Sequential(networks.conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), networks.conv(8, 6), *networks.head(6))
    sets = found(model)
    first = sets.axes["0.weight", 0].tolist()
    for axis in [("0.bias", 0), *((f"1.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")), ("3.weight", 1)]:
        assert sets.axes[axis].tolist() == first
    assert sets.axes["3.weight", 0].tolist() == sets.axes["6.weight", 1].tolist()
    assert sets.free() == sorted({*first, *sets.axes["3.weight", 0].tolist()})
    assert len(sets.free()) == 14
    assert reason(sets, "0.weight", 1) == INPUT
    assert reason(sets, "6.weight") == reason(sets, "6.bias") == OUTPUT
    assert reason(sets, "0.weight", 2) == "a position of the kernel"
    assert reason(sets, "0.weight") is None
    assert reason(sets, "nothing") is None
    assert sets.consumed == {("0.weight", 1), ("3.weight", 1), ("6.weight", 1)}


def test_a_shortcut_ties_its_ends():
    body = nn.Sequential(networks.conv(8, 4), nn.ReLU(), networks.conv(4, 8))
    model = nn.Sequential(networks.conv(3, 8), networks.Code(lambda s, x: x + s.body(x), body=body), *networks.head(8))
    sets = found(model)
    assert sets.axes["0.weight", 0].tolist() == sets.axes["1.body.2.weight", 0].tolist() == sets.axes["4.weight", 1].tolist()
    assert len(sets.free()) == 8 + 4


@pytest.mark.parametrize(
    ("shift", "free"),
    [
        (lambda x: x.roll(1, 1), 0),  # channels
        (lambda x: x.roll(1), 0),  # all in one row
        (lambda x: x.roll((1, 2), (0, -3)), 0),
        (lambda x: x.roll(1, 2), 6),  # rows
        (lambda x: x.roll((1, 2), (-1, 0)), 6),
        (lambda x: x.flip(1), 6),
        (lambda x: x.flip(2), 6),
        (lambda x: x.flip(-1, -3), 6),
    ],
)
def test_only_channels_that_are_shifted_are_locked(shift, free):
    model = nn.Sequential(networks.conv(3, 6), networks.Code(lambda s, x: shift(x)), *networks.head(6))
    sets = found(model)
    assert len(sets.free()) == free
    ids, read = sets.axes["0.weight", 0].tolist(), sets.axes["4.weight", 1].tolist()
    assert sorted(ids) == sorted(read) or not free
    small = networks.conv(3, 6)(torch.ones(1, 3, 8, 8))  # a channel alone shows where it goes
    moved = shift(torch.arange(6.0).view(1, 6, 1, 1).expand(small.shape))[0, :, 0, 0].tolist()
    assert not free or [ids[int(number)] for number in moved] == read


ROWS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize(
    ("pick", "free"),
    [
        (lambda s, x: x[:, :, s.rows], 6),  # a vector along the rows
        (lambda s, x: x.mean((2, 3), keepdim=True).squeeze(), 6),  # all axes of one position
        (lambda s, x: x[:, s.rows], 0),  # along the channels
        (lambda s, x: x[:, :, s.rows[None]].flatten(2, 3), 0),  # more than a vector
        (lambda s, x: x[:, :, s.rows, s.rows, None], 0),  # more than one
        (lambda s, x: x.split([6], 1)[0], 0),  # one piece, of so many
        (lambda s, x: x.split(4, 1)[0], 0),  # the first of two, unlike the second
        (lambda s, x: F.pad(x, (1, 1, 0, -2)), 6),  # rows cropped
        (lambda s, x: F.pad(x, (0, 0, 0, 0, -1, -2)), 0),  # channels cropped
        (lambda s, x: F.pad(x, (0, 0, 0, 0, -1, 2)), 0),
    ],
)
def test_channels_are_locked_where_code_picks_some(pick, free):
    model = nn.Sequential(networks.conv(3, 6), networks.Code(pick, rows=nn.Parameter(ROWS, requires_grad=False)), nn.Flatten())
    with torch.no_grad():
        width = model.eval()(torch.zeros(2, *SHAPE)).shape[1]
    sets = found(nn.Sequential(*model, nn.Linear(width, 5)))
    assert len([number for number in set(sets.axes["0.weight", 0].tolist()) if number not in sets.locked]) == free
    if not free:
        assert sets.reason(("0.weight", 0)) == BY_NUMBERS


def test_branches_of_a_concatenation_are_free_of_each_other():
    sets = found(networks.concatenation())
    a, b, x = (sets.axes[f"{layer}.weight", 0].tolist() for layer in ("2.a", "2.b", "0"))
    assert sets.axes["5.weight", 1].tolist() == sets.axes["3.weight", 0].tolist() == [*a, *b, *x]
    assert len({*a, *b, *x}) == 15


def test_a_depthwise_filter_goes_with_its_channel():
    sets = found(networks.depthwise())
    assert sets.axes["3.weight", 0].tolist() == sets.axes["0.weight", 0].tolist() == sets.axes["6.weight", 1].tolist()
    assert [(slot.module, slot.attribute) for slot in sets.slots] == [("3", "groups")]
    assert reason(sets, "3.weight", 1) == "an input inside a group"
    pairs = found(networks.depthwise_multiplier()).axes["2.weight", 0]
    assert pairs[::2].tolist() == pairs[1::2].tolist()
    assert len(set(pairs.tolist())) == 6


def test_a_whole_group_goes():
    sets = found(networks.grouped())
    assert sets.axes["0.weight", 0].reshape(4, 2).tolist() == sets.axes["3.weight", 0].reshape(4, 3)[:, :2].tolist()
    assert len(set(sets.axes["0.weight", 0].tolist())) == 4
    (slot,) = sets.slots
    model = networks.grouped()
    edits = channels.edits(sets, [int(slot.sets[1])], model)
    assert Set("3", "groups", 3) in edits
    assert Keep("0", 0, (0, 1, 4, 5, 6, 7)) in edits
    assert Keep("3", 0, (0, 1, 2, 6, 7, 8, 9, 10, 11)) in edits


def test_one_channel_in_and_one_out_is_no_depthwise_convolution():
    sets = found(networks.one_channel())
    assert sets.slots == ()
    assert sets.axes["1.weight", 1] == sets.axes["0.weight", 0]
    assert sets.axes["1.weight", 0] != sets.axes["1.weight", 1]


def test_a_linear_layer_behind_flatten_loses_every_position_of_a_channel():
    sets = found(networks.flattened())
    assert sets.axes["4.weight", 1].reshape(7, 4).tolist() == [[n] * 4 for n in sets.axes["0.weight", 0].tolist()]


def test_a_shuffle_moves_channels():
    """Channel i and i + 4 become neighbours; what a view splits stays free along its longest part."""
    sets = found(networks.shuffled())
    before, after = sets.axes["0.weight", 0], sets.axes["3.weight", 1]
    assert before.reshape(2, 4).T.ravel().tolist() == after.tolist()
    assert len(set(before.tolist())) == 4


def test_padding_counted_by_a_module_may_be_cut():
    model = networks.pad_module()
    sets = found(model)
    slots = {slot.attribute: slot for slot in sets.slots}
    out = sets.axes["2.long.weight", 0].tolist()
    assert slots["before"].sets.tolist() == out[:2]
    assert slots["after"].sets.tolist() == out[6:]
    assert out[2:6] == sets.axes["0.weight", 0].tolist()
    edits = channels.edits(sets, [out[0], out[6], out[7]], model)
    assert Set("2.short", "before", 1) in edits
    assert Set("2.short", "after", 0) in edits


SOFT = "normalisation takes statistics over; they may go with --set soft=true"
PADDED = "the number of padded channels is written in code"
LOCKED = [
    ("pad_code", "4.weight", 1, PADDED),
    ("cumulated", "2.weight", 0, "no rule for the operation cumsum"),
    ("rolled", "2.weight", 0, "channels shifted by a number in code"),
    ("part_of_channels", "2.weight", 0, BY_NUMBERS),
    ("split_by_number", "2.weight", 0, BY_NUMBERS),
    ("picked", "2.weight", 0, BY_NUMBERS),
    ("layer_norm", "0.weight", 0, f"channels that a layer {SOFT}"),
    ("group_norm_of_all", "2.weight", 0, f"channels that a group {SOFT}"),
    ("standardised", "2.weight", 0, "a position that goes into the statistics of a batch normalisation"),
    ("neighbours", "2.weight", 0, "a position read by a convolution"),
    ("softmax_of_channels", "2.weight", 0, "compared across channels by softmax"),
    ("largest_channel", "2.weight", 0, "reduced over channels by mean"),
    ("attention", "2.weight", 0, "activations multiplied with activations (attention)"),
    ("convolution_as_classifier", "2.weight", 0, OUTPUT),
    ("reads_its_input", "0.norm.weight", 0, "normalises the network's input"),
    ("several_outputs", "2.aux.weight", 0, OUTPUT),
    ("scalar_gain", "2.gain", 0, "dropped or spread by view"),
    ("sorted_channels", "0.weight", 0, "compared across channels by sort"),
    ("written_into_zeros", "2.a.weight", 0, "met by a tensor without channels"),
    ("written_to_out", "2.a.weight", 0, "written into a given tensor by cat"),
    ("written_to_out", "2.d.weight", 0, "written into a given tensor by sort"),
]


@pytest.mark.parametrize(("name", "tensor", "axis", "why"), LOCKED)
def test_what_may_not_be_cut_says_why(name, tensor, axis, why):
    sets = found(AWKWARD[name]())
    if name == "pad_code":
        assert {sets.locked.get(int(n)) for n in sets.axes[tensor, axis][[0, 5, 6, 7]]} == {why}
        assert {sets.locked.get(int(n)) for n in sets.axes[tensor, axis][1:5]} == {None}
    else:
        assert reason(sets, tensor, axis) == why
    assert len(sets.free()) >= 6  # the rest still go


def test_a_lock_holds_for_all_that_is_tied_to_it():
    body = networks.Code(lambda s, x: x + s.b(x).cumsum(1), b=networks.conv(8, 8))
    sets = found(nn.Sequential(networks.conv(3, 8), body, networks.conv(8, 6), *networks.head(6)))
    assert reason(sets, "1.b.weight") == "no rule for the operation cumsum"
    assert reason(sets, "0.weight") is not None  # met by what no longer has channels
    assert len(sets.free()) == 6


def test_a_buffer_is_cut_with_its_channels():
    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.randn(8, 1, 1))
            self.constant = torch.randn(6, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.mean

    class Constant(Centre):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.constant

    model = nn.Sequential(networks.conv(3, 8), Centre(), networks.conv(8, 6), Constant(), *networks.head(6))
    sets = found(model)
    assert sets.axes["1.mean", 0].tolist() == sets.axes["0.weight", 0].tolist()
    assert reason(sets, "2.weight") == "met by a tensor without channels"
    assert Keep("1.mean", 0, tuple(range(1, 8))) in channels.edits(sets, [int(sets.axes["0.weight", 0][0])], model)


# How much is free in known networks


FREE = [
    ("cifar:resnet8", {"shortcut": "conv"}, (3, 32, 32), (16 + 32 + 64) * 2),
    ("cifar:resnet8", {"shortcut": "pad"}, (3, 32, 32), (16 + 32 + 64) + 64),
    ("cifar:vgg11", {}, (3, 32, 32), 64 + 128 + 2 * 256 + 4 * 512),
    ("resnet18", {}, (3, 64, 64), 64 * 3 + 128 * 3 + 256 * 3 + 512 * 3),
    ("densenet121", {}, (3, 64, 64), 10240),  # TRACING.md, section 6
    ("squeezenet1_1", {}, (3, 64, 64), 64 + sum(9 * s for s in (16, 16, 32, 32, 48, 48, 64, 64))),
]


@pytest.mark.parametrize(("name", "kwargs", "shape", "count"), FREE)
def test_how_many_sets_are_free(name, kwargs, shape, count):
    assert len(found(named(name, **kwargs), shape).free()) == count


FREE_IN_AWKWARD = {
    **{"concatenation": 6 + 4 + 5 + 7, "gate": 8 + 4 + 6, "gate_linear": 8 + 4 + 6, "depthwise": 8 + 10},
    **{"depthwise_multiplier": 6 + 5, "grouped": 4 + 5, "flattened": 7 + 9, "shuffled": 4 + 6, "prelu": 8 + 6 + 6 + 1},
    **{"transposed": 8 + 6 + 7, "one_channel": 1 + 1 + 8, "twice": 8 + 6, "functional": 8 + 6 + 5, "borrowed": 8 + 6 + 5},
    **{"product": 8 + 6, "tokens": 8 + 6 + 5, "convolution_as_classifier": 8, "layer_scale": 8 + 5 + 2, "pad_module": 4 + 4 + 5},
    **{"pad_code": 6 + 4 + 5 + 5, "cumulated": 8 + 5, "rolled": 8 + 5, "group_norm": 8 + 2 + 5, "part_of_channels": 8 + 5},
    **{"power_of_two": 8 + 5, "several_outputs": 8, "instance_norm": 8 + 6 + 5, "transposed_grouped": 6 + 2 + 5},
    **{"chunked": 4 + 5 + 6, "split_by_width": 4 + 4 + 6, "split_by_half": 4 + 6, "split_unevenly": 3 + 5 + 3 + 6},
    **{"split_by_number": 8 + 5, "first_channels": 5 + 3 + 6, "reversed_channels": 8 + 2, "layer_norm": 12 + 5},
    **{"layer_norm_of_positions": 8 + 5, "group_norm_of_all": 8 + 5, "wide_groups": 4 + 6 + 5, "transposed_depthwise": 8 + 5},
    **{"standardised": 9 + 8 + 5, "neighbours": 8 + 5, "selected": 8 + 6 + 5, "softmax_of_channels": 8 + 5},
    **{"largest_channel": 8 + 5 + 1, "attention": 8 + 5, "pixels": 3 + 4 + 5, "shuffle_module": 4 + 6, "unpooled": 8 + 6},
    **{"edges": 8 + 6, "linear_unit": 4 + 6, "unfolded": 8 + 6 + 5, "taken_apart": 8 + 6, "picked": 8 + 5},
    **{"log_sigmoid": 8 + 6, "condition": 8 + 6 + 5 + 4, "in_place": 8 + 6 + 5 + 2, "copied": 8 + 6 + 5 + 2},
    **{"written_through_views": 8 + 6 + 5 + 5, "written_in_pieces": 8 + 6, "written_into_zeros": 7 + 6},
    **{"written_to_out": 7 + 6 + 6, "sampled": 8 + 6 + 5, "groups_of_the_input": 8 + 5, "folded": 8 + 5},
    **{"uneven_groups": 4 + 5, "padded_tokens": 8 + 6, "computed_linear": 12 + 6 + 1, "largest_positions": 8 + 6},
    **{"largest_channels": 5, "pooled_channels": 6, "squeezed": 8 + 5, "one_channel_repeated": 1 + 5},
    **{"normalised_with_constants": 5, "scalar_gain": 8 + 6, "product_from_the_left": 8 + 6, "sorted_channels": 6},
    **{"scripted": 8 + 6, "tied_layers": 8 + 6, "filters_as_rows": 8 + 6 + 6, "input_in_place": 8 + 6},
}


@pytest.mark.parametrize("name", FREE_IN_AWKWARD)
def test_how_many_sets_are_free_in_awkward_networks(name):
    """Locked is always right, but only what must be is. An axis of one position counts as one set."""
    assert len(found(AWKWARD[name]()).free()) == FREE_IN_AWKWARD[name]


# Edits


@pytest.mark.parametrize("name", AWKWARD)
def test_edits_name_each_layer_axis_once_and_keep_what_is_not_removed(name):
    model = AWKWARD[name]()
    sets = found(model)
    assert channels.edits(sets, [], model) == []
    removed = removable(sets, 0.5)
    edits = channels.edits(sets, removed, model)
    places = [(edit.module, edit.axis) for edit in edits if isinstance(edit, Keep)]
    assert len(places) == len(set(places))
    for edit in edits:
        if isinstance(edit, Keep):
            assert list(edit.index) == sorted(set(edit.index))
    touched = [ids for ids in sets.axes.values() if set(ids.tolist()) & set(removed)]
    assert bool(edits) == bool(touched)


def test_a_batch_normalisation_is_one_edit():
    model = nn.Sequential(networks.conv(3, 8), nn.BatchNorm2d(8), networks.conv(8, 6), *networks.head(6))
    sets = found(model)
    edits = channels.edits(sets, sets.axes["0.weight", 0].tolist()[2:4], model)
    kept = (0, 1, 4, 5, 6, 7)
    assert sorted(edits, key=lambda e: (e.module, e.axis)) == [Keep("0", 0, kept), Keep("1", 0, kept), Keep("2", 1, kept)]


def test_the_axis_of_an_edit_is_the_layers_own():
    """0 is the output and 1 the input, also where the weight of a transposed convolution has them the other way."""
    model = networks.transposed()
    sets = found(model)
    number = int(sets.axes["2.weight", 0][3])  # (in, out, k, k)
    assert [(e.module, e.axis) for e in channels.edits(sets, [number], model)] == [("0", 0), ("2", 1)]
