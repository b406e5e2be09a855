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


def test_the_makefile_has_the_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_flag_in_the_readme_exists():
    from test_cli import FLAGS

    known = {flag for flags in FLAGS.values() for flag in flags}
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
        if "compactcli " in line
    ]
    used = {flag for line in commands for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line.partition("#")[0])}
    assert used - {"-c", "-e"} <= known | {"-o"}
