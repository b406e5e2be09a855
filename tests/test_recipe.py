"""The JSON of a recipe: it comes back as it was, equal recipes give equal bytes, and a hostile one gets one line."""

import json
import string
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactcli.errors import CompactError
from compactcli.recipe import (
    DTYPES,
    FORMAT,
    SETTABLE,
    Keep,
    Measures,
    Preprocessing,
    Recipe,
    Replace,
    Set,
    Share,
    Source,
    Step,
    without_tensors,
)

names = st.text(string.ascii_letters + string.digits + "._", min_size=1, max_size=20)
options = st.dictionaries(names, st.integers(0, 1 << 31), max_size=3)
indices = st.sets(st.integers(0, (1 << 20) - 1), min_size=1, max_size=30).map(lambda s: tuple(sorted(s)))
edits = st.one_of(
    st.builds(Keep, names, st.integers(0, 1), indices),
    st.builds(Replace, names, names, options),
    st.builds(Set, names, st.sampled_from(sorted(SETTABLE)), st.integers(0, 1 << 31)),
    st.builds(Share, names, names, options),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
percentages = st.none() | st.floats(0, 100)
evaluated = st.none() | st.builds(lambda d, n: {"dataset": d, "split": "test", "images": n}, names, st.integers(0, 10**6))
measures = st.builds(Measures, *[st.none() | st.integers(0, 10**12)] * 3, percentages, evaluated)
values = st.none() | st.booleans() | st.integers(-9, 10**9) | numbers | st.text(max_size=9)
steps = st.builds(
    Step,
    st.sampled_from(["compress", "finetune"]),
    st.none() | names,
    st.dictionaries(names, values, max_size=4),
    st.lists(edits, max_size=4).map(tuple),
    measures,
    st.none() | numbers,
    names,
)
colours = st.lists(numbers, min_size=3, max_size=3).map(tuple)
deviations = st.lists(st.floats(0, exclude_min=True, allow_infinity=False), min_size=3, max_size=3).map(tuple)
bare = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=20)
recipes = st.builds(
    Recipe,
    st.text(min_size=1, max_size=20),
    st.dictionaries(names, values, max_size=3),
    st.tuples(*[st.integers(1, 4096)] * 3),
    st.builds(Preprocessing, colours, deviations, st.none() | st.integers(1, 4096), names),
    st.none() | st.builds(Source, bare, st.text("0123456789abcdef", min_size=64, max_size=64), measures),
    st.none() | st.lists(st.text(max_size=9), max_size=4).map(tuple),
    st.none() | names,
    st.lists(steps, max_size=3).map(tuple),
    st.sampled_from([None, *DTYPES]),
)


def recipe(*edits_: object) -> Recipe:
    """A small recipe whose one step has these edits."""
    first = Recipe("cifar:resnet8", {"width": 4}, (3, 32, 32), Preprocessing((0.5,) * 3, (0.25,) * 3))
    return first.then(Step("compress", "hinge", {"ratio": 0.5}, tuple(edits_), Measures(1, 2), 0.125, "0.1.0"))


def tree(*edits_: object) -> dict:
    return json.loads(recipe(*edits_).dumps())


def refused(content: object, message: str) -> None:
    """It is refused with one line."""
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(CompactError, match=message) as caught:
        Recipe.loads(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(recipes)
def test_it_comes_back_as_it_was(given_recipe):
    assert Recipe.loads(given_recipe.dumps()) == given_recipe


@given(recipes)
def test_equal_recipes_give_equal_bytes(given_recipe):
    text = given_recipe.dumps()
    assert Recipe.loads(text).dumps() == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert "\n" not in text


def test_the_order_of_options_does_not_matter():
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert recipe(Replace("x", "hinge.decomposed", one)).dumps() == recipe(Replace("x", "hinge.decomposed", two)).dumps()


def test_the_text():
    """What is in files that others keep: this may gain keys, not lose or change them."""
    text = recipe(
        Keep("conv", 1, (0, 1, 2, 5, 7, 8)),
        Replace("fc", "hinge.decomposed", {"rank": 3}),
        Set("conv", "groups", 6),
        Share("net", "csg.generator", {"code": 9}),
    ).dumps()
    assert json.loads(text) == {
        "format": 1,
        "architecture": "cifar:resnet8",
        "kwargs": {"width": 4},
        "input_shape": [3, 32, 32],
        "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize": None, "interpolation": "bilinear"},
        "source": None,
        "classes": None,
        "dataset": None,
        "steps": [
            {
                "command": "compress",
                "method": "hinge",
                "options": {"ratio": 0.5},
                "edits": [
                    {"kind": "keep", "module": "conv", "axis": 1, "index": "0-2,5,7-8"},
                    {"kind": "replace", "module": "fc", "layer": "hinge.decomposed", "options": {"rank": 3}},
                    {"kind": "set", "module": "conv", "attribute": "groups", "value": 6},
                    {"kind": "share", "name": "net", "layer": "csg.generator", "options": {"code": 9}},
                ],
                "measures": {"params": 1, "macs": 2, "size_bytes": None, "accuracy": None, "evaluated": None},
                "error": 0.125,
                "version": "0.1.0",
            }
        ],
        "dtype": None,
    }


def test_tensors_are_not_in_the_text():
    edit = Replace("fc", "hinge.decomposed", {"rank": 3}, {"0.weight": object()})
    share = Share("net", "csg.generator", {}, {"weight": object()})
    assert Recipe.loads(recipe(edit, share).dumps()).edits == (edit, share)  # tensors do not count
    assert "tensors" not in recipe(edit, share).dumps()
    assert all(not bare.tensors for bare in without_tensors([edit, share]))
    assert edit.tensors  # the one given is left alone
    assert without_tensors([Keep("a", 0, (1,))]) == (Keep("a", 0, (1,)),)


def test_edits_of_all_steps_in_order():
    first, second = Keep("a", 0, (1,)), Set("b", "groups", 2)
    both = recipe(first).then(recipe(second).steps[0])
    assert both.edits == (first, second)
    assert len(both.steps) == 2
    assert len(recipe(first).steps) == 1


# Versions and keys


@pytest.mark.parametrize("version", [FORMAT + 1, 99, 1 << 70])
def test_a_newer_format_is_refused(version):
    refused({**tree(), "format": version}, rf"has format {version}, this compactcli reads up to {FORMAT}; upgrade compactcli")


@pytest.mark.parametrize("version", [None, "1", 1.0, True, []])
def test_a_format_that_is_no_number_is_refused(version):
    refused({**tree(), "format": version}, "no format version")


@pytest.mark.parametrize(
    "edit", [Keep("a", 0, (1,)), Replace("a", "hinge.decomposed", {}), Set("a", "groups", 1), Share("a", "b", {})]
)
def test_unknown_keys_inside_edits_are_refused(edit):
    content = tree(edit)
    content["steps"][0]["edits"][0]["axes"] = 3
    refused(content, f"the recipe's {edit.kind} edit has the unknown key 'axes'; it needs a newer compactcli")
    content["steps"][0]["edits"][0]["tensors"] = {}
    refused(content, "unknown key")


def test_unknown_kinds_of_edit_are_refused():
    content = tree()
    content["steps"][0]["edits"] = [{"kind": "transpose", "module": "a"}]
    refused(content, "an edit of unknown kind 'transpose'; it needs a newer compactcli")


def test_unknown_keys_elsewhere_are_ignored():
    edit = Keep("a", 0, (1,))
    content = tree(edit)
    for place in (content, content["preprocessing"], content["steps"][0], content["steps"][0]["measures"]):
        place["new"] = {"a": [1]}
    assert Recipe.loads(json.dumps(content)) == recipe(edit)


# Hostile values


@pytest.mark.parametrize(
    "index",
    [
        *("", "-", "1-", "-1", "a", "1,,2", "1;2", " 1", "1 ", "1.0", "1e3", "0x1", "१", "+1", "1\n"),
        *("5-3", "3,2", "1,1", "1-4,4", "0-1048576", "1048576", "99999999", "0-9999999999999999999"),
        *([0, 1], 3, None, True, {"a": 1}),
    ],
)
def test_hostile_indices_are_refused(index):
    content = tree(Keep("a", 0, (1,)))
    content["steps"][0]["edits"][0]["index"] = index
    refused(content, "the recipe in this file is damaged")


def test_short_text_for_many_channels_has_a_limit():
    """Each of the edits is small, and each of the channels takes some bytes once it is read."""
    content = tree(Keep("a", 0, (1,)))
    edit = {**content["steps"][0]["edits"][0], "index": "0-1048575"}
    content["steps"][0]["edits"] = [edit] * 4
    assert sum(len(each.index) for each in Recipe.loads(json.dumps(content)).edits) == 1 << 22
    content["steps"][0]["edits"] = [edit] * 1000
    tracemalloc.start()
    refused(content, "its edits keep more than 4194304 channels")
    assert tracemalloc.get_traced_memory()[1] < 500e6
    tracemalloc.stop()


@pytest.mark.parametrize("value", ["1e999", "-1e999", "[" * 5 + "1" + "]" * 5, '{"a":' * 5 + "1" + "}" * 5])
@pytest.mark.parametrize("where", ["kwargs", "options"])
def test_options_are_words_and_numbers_that_can_be_told(where, value):
    content = tree(Keep("a", 0, (1,)))
    place = content if where == "kwargs" else content["steps"][0]
    place[where] = {"name": "PLACE"}
    with pytest.raises(CompactError, match="the recipe in this file is damaged") as caught:
        Recipe.loads(json.dumps(content).replace('"PLACE"', value))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("index", "text"), [((0,), "0"), ((0, 1), "0-1"), ((3, 5), "3,5"), (tuple(range(1 << 12)), "0-4095")])
def test_indices_are_short(index, text):
    assert tree(Keep("a", 0, index))["steps"][0]["edits"][0]["index"] == text


@pytest.mark.parametrize("attribute", ["weight", "__class__", "forward", "training", "out_channels", "", None, 3])
def test_only_some_attributes_may_be_set(attribute):
    content = tree(Set("a", "groups", 1))
    content["steps"][0]["edits"][0]["attribute"] = attribute
    allowed = "after, before, c, dim_conv3, dim_untouched, expand_chs, groups, in_channels, num_1x1_c, num_groups, width"
    refused(content, f"sets the attribute .*; only {allowed} may be set$")


def paths(value: object, here: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The place of every value in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in items for path in paths(item, (*here, key)))]


HOSTILE = [None, True, -1, 1 << 80, 10**400, 0.5, "", "x" * 3000, "a\nb", [], {}, [[]], {"a": {}}]


@pytest.mark.parametrize("value", [*HOSTILE, float("nan"), float("inf")], ids=lambda v: repr(v)[:12])
def test_any_value_anywhere_is_read_or_refused_in_one_line(value):
    """What is read is as good as written: it goes back into a file."""
    source = Source("net.pt", "0" * 64, Measures(3, 4, 5))
    good = Recipe("a", {"b": 1}, (3, 8, 8), Preprocessing((0.5,), (1.0,), 9), source, ("c",), "digits").then(
        recipe(Keep("a", 0, (1,)), Replace("a", "b", {"rank": 1}), Set("a", "groups", 1), Share("a", "b", {"c": 2})).steps[0]
    )
    for path in paths(json.loads(good.dumps())):
        content = json.loads(good.dumps())
        if not path:
            content = value
        else:
            place = content
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
        read, line = None, ""
        try:
            read = Recipe.loads(json.dumps(content))
        except CompactError as problem:
            line = str(problem)
        assert "\n" not in line, path
        assert len(line) < 400, path
        assert read is None or Recipe.loads(read.dumps()) == read, path


def test_numbers_are_stored_in_types_that_are_known():
    assert Recipe.loads(json.dumps({key: value for key, value in tree().items() if key != "dtype"})) == recipe()
    for value in ("float8", "float32", "", 3, [], {"float16": 1}):
        refused({**tree(), "dtype": value}, "stores numbers as .*; it needs a newer compactcli")


@pytest.mark.parametrize("shape", [[], [3], [3, 32], [3, 32, 32, 32], [0, 32, 32], [3, -1, 32], [3, 1 << 20, 32], "3x32x32"])
def test_an_input_is_an_image(shape):
    refused({**tree(), "input_shape": shape}, "the recipe in this file is damaged")


@pytest.mark.parametrize("name", ["/dev/zero", "../model.pt", "a\0b"])
def test_a_source_is_the_bare_name_of_a_file(name):
    refused({**tree(), "source": {"name": name, "sha256": "0" * 64, "measures": {}}}, "the recipe in this file is damaged")


@pytest.mark.parametrize("std", [0, -0.25])
def test_deviations_are_positive(std):
    preprocessing = {**tree()["preprocessing"], "std": [0.25, 0.25, std]}
    refused({**tree(), "preprocessing": preprocessing}, "the recipe in this file is damaged")


def test_numbers_up_to_their_limits_are_read():
    assert Recipe.loads(json.dumps({**tree(), "input_shape": [3, 1 << 16, 32]})).input_shape == (3, 1 << 16, 32)
    refused({**tree(), "input_shape": [3, (1 << 16) + 1, 32]}, "the recipe in this file is damaged")
    assert Recipe.loads(json.dumps(tree(Set("conv", "groups", 1 << 31)))).edits == (Set("conv", "groups", 1 << 31),)
    refused(tree(Set("conv", "groups", (1 << 31) + 1)), "the recipe in this file is damaged")
    refused(tree(Keep("conv", 2, (0, 1))), "the recipe in this file is damaged")


def test_what_a_file_of_a_methods_authors_begins_with_is_its_first_network():
    one, two = (Set("conv", "groups", number) for number in (2, 4))
    bare = Recipe("cifar:resnet8", {}, (3, 32, 32), Preprocessing((0.5,) * 3, (0.25,) * 3))
    opened, step = Step("open", "csg", {}, (one,), Measures(1, 2), None, "0.1.0"), recipe(two).steps[0]
    assert [made.opened for made in (bare, bare.then(step), bare.then(opened), bare.then(opened).then(step))] == [
        (),
        (),
        (one,),
        (one,),
    ]


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"recipe"', "{}", '{"format": 1}', "\0", "[" * 100_000])
def test_damaged_text_is_refused(text):
    refused(text, "the recipe in this file is damaged|no format version")


def test_no_torch():
    code = "import sys; import compactcli.recipe; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
