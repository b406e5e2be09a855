"""README stays true: its figures outside tables are those of the committed results, its commands are the Makefile's."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_times_of_the_starts_are_what_was_found():
    rows = json.loads((RESULTS / "starts-resnet56.json").read_text())["rows"]
    seconds = [f"{rows[f'{method} 0.7']['seconds']:.0f}" for method in ("linearconv", "csg", "hetconv")]
    assert f"at 70 % in {seconds[0]}, {seconds[1]} and {seconds[2]} s" in " ".join(README.split())


def test_the_figures_of_the_authors_csg_files_are_what_was_found():
    rows = json.loads((RESULTS / "csg_files.json").read_text())["rows"]
    names = {
        "ResNet-56": "csg-rn56_1616-128.t7",
        "ResNet-20": "csg-rn20_1616-128.t7",
        "DenseNet-BC": "csg-dnbc4036-csg1212-72.t7",
    }
    for name, file in names.items():
        assert f"{rows[file]['accuracy']:.2f} % ({name})" in " ".join(README.split())


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


def test_the_time_of_a_search_step_holds_the_results():
    found = json.loads((RESULTS / "search_speed-hinge.json").read_text())
    assert f"A step of a search takes {found['ratio']:.2f} times a plain step" in " ".join(README.split())


def test_the_figures_of_the_search_hold_the_results():
    rows = json.loads((RESULTS / "finetune-resnet20.json").read_text())["rows"]
    row, decayed, without = (rows[key] for key in ("auto 0.5", "auto 0.5 --weight-decay 0.0005", "calibrated 0.5"))
    text = " ".join(README.split())
    assert f"at half its MACs with {row['before']:.2f} %, with the larger weight decay {decayed['before']:.2f} %" in text
    assert f"calibration with {without['before']:.2f} %" in text
    assert f"torch 2.11, from {row['original']:.2f} %" in text
    assert f"torch 2.13.0+cpu, from {decayed['original']:.2f} %" in text


def test_the_time_of_a_sweep_holds_the_results():
    found = json.loads((RESULTS / "sweep.json").read_text())
    assert f"no training: {found['required']['seconds'] / 60:.1f} minutes, killed once and resumed" in " ".join(README.split())


def test_the_figures_of_training_hold_the_results():
    networks = json.loads((RESULTS / "train_speed.json").read_text())["networks"]
    rows = next(network["contenders"] for network in networks if network["network"] == "resnet20")
    for contender in ("ours", "minimal loop", "torchvision reference"):
        (row,) = [row for row in rows if row["contender"] == contender]
        assert f"{row['images_per_second']:,.0f}" in README
    recovered = json.loads((RESULTS / "recover-resnet20.json").read_text())["rows"]
    text = " ".join(README.split())
    for contender in ("ours", "peer"):
        found = [recovered[f"{contender}{seed}"]["after"] for seed in ("", " --seed 1", " --seed 2")]
        assert f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f} %" in text
    assert f"the whole network: {recovered['control']['after']:.2f} %" in text
