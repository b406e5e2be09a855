"""README stays true: its figures are those of the committed results, its commands are the Makefile's."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("network", ["resnet20", "resnet56"])
def test_the_table_holds_the_results(network):
    result = json.loads((RESULTS / f"oneshot-{network}.json").read_text())
    rows = [line for line in README.splitlines() if line.startswith("| ResNet-" + network.removeprefix("resnet"))]
    assert len(rows) == len(result["torch_pruning"]) == 2
    for peer, row in zip(result["torch_pruning"], rows, strict=True):
        ours = [each for each in result["ours"] if each["ratio"] == peer["ratio"]]
        assert [each["images"] for each in ours] == [64, 256, 1024]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
            f"{100 * peer['ratio']:.0f} %",
            f"{result['original']:.2f}",
            *(f"{each['accuracy']:.2f} ± {each['deviation']:.2f}" for each in ours),
            f"{peer['accuracy']:.2f}",
        ]


@pytest.mark.parametrize(("network", "name"), [("resnet34", "ResNet-34"), ("resnet50", "ResNet-50"), ("cifar:vgg16", "VGG-16")])
def test_the_table_of_speed_holds_the_results(network, name):
    found = json.loads((RESULTS / "speed.json").read_text())
    settings = next(each["settings"] for each in found["networks"] if each["network"] == network)
    rows = [line for line in README.splitlines() if line.startswith(f"| {name},")]
    assert len(rows) == 2
    for batch, row in zip((1, 16), rows, strict=True):
        wanted = [str(batch)]
        for memory_format in ("channels_last", "contiguous"):
            setting = next(each for each in settings if (each["batch"], each["memory_format"]) == (batch, memory_format))
            own = {variant["variant"]: variant for variant in setting["variants"]}
            wanted.append(f"{own['dense']['median_ms']:.1f}")
            wanted += [f"{own[variant]['share']:.2f}" for variant in ("ours", "Torch-Pruning, global")]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == wanted


def test_the_table_of_starts_holds_the_results():
    rows = json.loads((RESULTS / "starts-resnet20.json").read_text())["rows"]
    for ratio in (0.9, 0.7, 0.5, 0.3):
        wanted = []
        for method in ("linearconv", "csg"):
            row = rows[f"{method} {ratio:g}"]
            wanted += [f"{row['accuracy']:.2f}", f"{row['plain']['accuracy']:.2f}"]
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {100 * ratio:.0f} % | ") and line.count("|") == 6]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == wanted


def test_what_the_larger_network_starts_from_is_what_was_found():
    rows = json.loads((RESULTS / "starts-resnet56.json").read_text())["rows"]
    text = " ".join(README.split())
    for method, told in (("linearconv", "linearconv keeps {} %"), ("csg", "csg {} %"), ("hetconv", "of its MACs, {} %")):
        assert told.format(f"{rows[f'{method} 0.7']['accuracy']:.2f}") in text
    seconds = [f"{rows[f'{method} 0.7']['seconds']:.0f}" for method in ("linearconv", "csg", "hetconv")]
    assert f"in {seconds[0]}, {seconds[1]} and {seconds[2]} s on 2 threads" in text


def test_the_makefile_has_the_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_flag_in_the_readme_exists():
    from test_cli import FLAGS

    known = {flag for flags in FLAGS.values() for flag in flags}
    commands = [
        line[line.index("compactcli ") :]  # not torchrun's
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
        if "compactcli " in line
    ]
    used = {flag for line in commands for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line.partition("#")[0])}
    assert used - {"-c", "-e"} <= known | {"-o"}


def test_the_table_of_coverage_holds_the_results():
    found = json.loads((RESULTS / "coverage.json").read_text())["summary"]
    ours = found["ours"]
    wanted = {
        "compactcli": [ours["law"], ours["law"], ours["law"], ours["train"], f"{100 * ours['cnns_mean_free']:.0f} %"],
        "Torch-Pruning": _coverage_row(found["peer"]),
        "Torch-Pruning, helped": _coverage_row(found["peer_helped"]),
    }
    for name, cells in wanted.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {name} | ") and line.count("|") == 7]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == cells


def _coverage_row(peer):
    return [*(peer[key] for key in ("runs", "same_outputs", "law", "train")), f"{100 * peer['cnns_mean_free']:.0f} %"]


def test_the_time_of_a_search_step_holds_the_results():
    found = json.loads((RESULTS / "search_speed-hinge.json").read_text())
    assert f"A step of a search takes {found['ratio']:.2f} times a plain step" in " ".join(README.split())


def test_the_figures_of_the_search_hold_the_results():
    rows = json.loads((RESULTS / "finetune-resnet20.json").read_text())["rows"]
    row, without = rows["auto 0.5"], rows["calibrated 0.5"]
    assert f"leave ResNet-20 at half its MACs with {row['before']:.2f} %" in " ".join(README.split())
    assert f"15 more of fine-tuning with {row['after']:.2f} %" in " ".join(README.split())
    assert (
        f"alone leaves it with {without['before']:.2f} %, and 20 epochs of fine-tuning then with {without['after']:.2f} %"
        in README
    )


def test_the_figures_of_training_hold_the_results():
    networks = json.loads((RESULTS / "train_speed.json").read_text())["networks"]
    rows = next(network["contenders"] for network in networks if network["network"] == "resnet20")
    for contender in ("ours", "minimal loop", "torchvision reference"):
        (row,) = [row for row in rows if row["contender"] == contender]
        assert f"{row['images_per_second']:,.0f}" in README
    recovered = json.loads((RESULTS / "recover-resnet20.json").read_text())["rows"]
    flags = "--distill-weight 0.9"
    assert f"recover {flags}" in README
    assert all(f"{recovered[f'{contender} {flags}']['after']:.2f} %" in README for contender in ("ours", "peer", "control"))
