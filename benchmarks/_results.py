"""docs/results.md: the papers' tables beside what was found here, and what was not run, with the reason.

`python -m benchmarks tables` writes it. What others have published is in `_papers`.
"""

import statistics
from typing import Any

from . import _papers as papers
from ._common import read
from ._tables import CONTENDERS, NAMES, markdown, percent
from .campaign import EPOCHS, LENGTHS, RATIOS, planned
from .csg_files import LEAST
from .finetune import LEAST_ABOVE_CONTROL, LEAST_ABOVE_PEER, PEERS, Run
from .runtimes import NETWORKS

RECOVER = {"ours": "calibrated", "peer": "peer-norm"}  # what `recover` calls otherwise than `finetune`
NOT_RUN = "not run"
WAITING = "not run yet"
UNTRAINED = "not run: there is no such network trained on these images"

Row = dict[str, Any]


def results() -> str:
    """The document: the papers' tables beside what was found here."""
    return "\n".join(
        [_introduction(), _hinge(), _peers(), _methods(), _every_run(), _fcf(), _linearconv(), _csg(), _hetconv(), _runtimes()]
    )


def _introduction() -> str:
    small, large = (f"{read(f'oneshot-{name}')['original']:.2f}" for name in ("resnet20", "resnet56"))
    return f"""# The papers' tables beside what was found here

Made from benchmarks/results by `python -m benchmarks tables` and `make docs`; do not edit. `python -m benchmarks campaign --list`
tells which of the runs that take hours are done, `--resume` makes the others.

The images here are CIFAR-10's as JPEG files, which costs some points of accuracy, and the networks a ResNet-20 ({small} %) and a
ResNet-56 ({large} %) adapted to them. So no accuracy equals one of a paper; what compares is the change from the whole network,
trained as long (the control), or where there is no control yet, from the original. Fine-tuning keeps the last weights and reads
the test images once, at its end; the papers' authors took the best epoch on the test images. Accuracies are of all 10,000 test
images. A dash stands for a figure that the paper does not print, or that could not be found.
"""


def _hinge() -> str:
    """Tables 1, 2 and 4."""
    rows = []
    for paper in papers.HINGE:
        whole = "–" if paper.whole is None else f"{paper.whole:.2f}"
        left = f"{paper.flops:.2f}", "–" if paper.params is None else f"{paper.params:.2f}"
        rows.append(
            [str(paper.table), f"{paper.network}, {paper.dataset}", f"{paper.error:.2f}", whole, *left, *_hinge_here(paper)]
        )
    theirs = "table | network | error | whole | FLOPs left | parameters left"
    ours = "error here | whole | MACs left | parameters left | run here"
    counted = read("counts")["hinge"]
    starts = [
        [name, f"{flops:,}", f"{counted[key]['flops']:,}", f"{params:,}", f"{counted[key]['params']:,}"]
        for key, (name, flops, params) in papers.HINGE_WHOLE.items()
    ]
    columns = "network | FLOPs, authors' code | counted here | parameters, authors' code | counted here"
    return f"""## Hinge (Li et al., CVPR 2020)

Errors of top-1 and shares, in percent. The paper fine-tunes for 300 epochs after its search (WRN: 200).

{markdown(f"{theirs} | {ours}", rows)}
The networks to start from, by the authors' counter (`python -m benchmarks counts`):

{markdown(columns, starts)}"""


def _hinge_here(paper: papers.Hinge) -> list[str]:
    """Error, that of the control, what is left, and what was run."""
    nothing = ["–"] * 4
    if paper.dataset != "CIFAR-10":
        return [*nothing, f"{NOT_RUN}: there are no images of {paper.dataset} here"]
    places = {("ResNet-56", 50.00): ("resnet56", 0.5), ("ResNet-56", 24.00): ("resnet56", 0.24)}
    places |= {("ResNet-20", 45.50): ("resnet20", papers.RATES["auto"].ratio)}
    if (paper.network, paper.flops) not in places:
        return [*nothing, UNTRAINED]
    network, ratio = places[paper.network, paper.flops]
    lengths = LENGTHS if network == "resnet56" else (EPOCHS,)
    own: list[Row] = next(filter(None, (_of(network, "auto", ratio, epochs) for epochs in sorted(lengths, reverse=True))), [])
    if not own:
        return [*nothing, f'{WAITING}: `python -m benchmarks campaign --resume --only "{network} auto {ratio:g}"`']
    control = _of(network, "control", 1.0, own[0]["run"]["epochs"])
    kept = (f"{100 * statistics.mean(row[share] for row in own):.2f}" for share in ("macs_kept", "params_kept"))
    whole = f"{100 - _mean(control):.2f}" if control else f"{100 - own[0]['original']:.2f} (original)"
    return [_spread([100 - row["after"] for row in own]), whole, *kept, _told(own)]


def _peers() -> str:
    """Torch-Pruning's own figures, and ours on equal terms."""
    rows, whole = [], papers.TORCH_PRUNING_WHOLE
    for way, found in papers.TORCH_PRUNING.items():
        for accuracy, times in found:
            rows.append([way, f"{100 / times:.0f} %", f"{whole:.2f}", f"{accuracy:.2f}", f"{accuracy - whole:+.2f}"])
    theirs = markdown("Torch-Pruning's README, ResNet-56 | MACs kept | whole | accuracy | change", rows)
    rows = []
    for epochs, seeds in LENGTHS.items():
        waiting = f"{WAITING}: {epochs} epochs" + (f", {len(seeds)} seeds, with a GPU" if len(seeds) > 1 else "")
        for contender, ratio in [*((name, ratio) for ratio in RATIOS for name in ("auto", *PEERS)), ("control", 1.0)]:
            figures = _figures_beside_control("resnet56", contender, ratio, epochs, waiting)
            ahead = _ahead(ratio, epochs) if contender == "auto" else "–"
            rows.append([CONTENDERS[contender], percent(ratio), *figures[:2], ahead, figures[2]])
    header = "ResNet-56, here | MACs kept | accuracy | from the control | ahead of Torch-Pruning | run here"
    ours = markdown(header, rows)
    below, above = LEAST_ABOVE_CONTROL["resnet56"], LEAST_ABOVE_PEER
    required = "; ".join(f"at {percent(ratio)}, {0.0 - below[ratio]} and {above[ratio]}" for ratio in RATIOS)
    return f"""## Torch-Pruning 1.6.1, on equal terms

{theirs}
{ours}
Required of hinge, in points, are at most so many below the control and at least so many ahead of the better of Torch-Pruning's
two: {required} (the mean of {len(LENGTHS[120])} seeds; with one seed, more than 0.3 ahead).

Why Torch-Pruning may lose more here than in its README: there it starts from another network, on the images as they were
published, and learns sparsely for 100 epochs before it is fine-tuned. Here its sparse learning has as many epochs as
compactcli's search, a quarter of all, and its fine-tuning the same loop, teacher and number of epochs. The strength of its
regularisation, its learning rate and its importance are those of its own script. This ResNet-56 has shortcuts without
parameters: Torch-Pruning's result runs only if the stem and the second convolution of each block are left alone, so that the
first convolutions lose all that goes. `benchmarks/finetune.py` has the settings.
"""


def _ahead(ratio: float, epochs: int) -> str:
    """Points of hinge above the better of Torch-Pruning's, once both are there."""
    own = _of("resnet56", "auto", ratio, epochs)
    differences = [_difference(own, _of("resnet56", peer, ratio, epochs)) for peer in PEERS]
    known = [each for each in differences if each is not None]
    return f"{min(known):+.2f}" if len(known) == len(PEERS) else "–"


def _methods() -> str:
    """ResNet-20 by all five methods."""
    rows = []
    for contender, rate in papers.RATES.items():
        own = _of("resnet20", contender, rate.ratio, EPOCHS)
        kept = [f"{100 * own[0][share]:.1f} %" for share in ("macs_kept", "params_kept")] if own else ["–", "–"]
        figures = _figures_beside_control("resnet20", contender, rate.ratio, EPOCHS, WAITING)
        rows.append([rate.method, f"{100 * rate.ratio:.1f} % of {rate.of}", rate.change, *kept, *figures])
    control = _figures_beside_control("resnet20", "control", 1.0, EPOCHS, WAITING)
    rows.append([CONTENDERS["control"], "100 %", "–", "100 %", "100 %", *control])
    header = "method | kept in the paper | change there | MACs | parameters | accuracy here | from the control | run here"
    return f"""## ResNet-20 by all five methods, at their papers' rates

Of {EPOCHS} epochs, hinge and fcf search for a quarter and are fine-tuned for the rest; the others are trained on for all.

{markdown(header, rows)}"""


def _figures_beside_control(network: str, contender: str, ratio: float, epochs: int, waiting: str) -> list[str]:
    """Accuracy, the change from the control with as many epochs, and what was run."""
    own, control = _of(network, contender, ratio, epochs), _of(network, "control", 1.0, epochs)
    if not own:
        return ["–", "–", waiting]
    change = None if contender == "control" else _difference(own, control)
    return [_spread([row["after"] for row in own]), "–" if change is None else f"{change:+.2f}", _told(own)]


def _every_run() -> str:
    """Every run of `finetune` and `recover`, of whatever length."""
    rows = []
    for network in ("resnet56", "resnet20"):
        for row in _runs(network):
            epochs = row["epochs"]["search"], row["epochs"]["finetune"]
            rows.append(_run(network, row["run"]["contender"], row, epochs, row["run"]["seed"]))
        found = read(f"recover-{network}")
        for key, row in found.get("rows", {}).items():
            if "--limit" not in key:
                name, seed = RECOVER.get(key.split()[0], key.split()[0]), row["settings"]["seed"]
                rows.append(_run(network, name, {"machine": found["machine"]} | row, (0, row["history"][-1]["epoch"]), seed))
    header = "network | what | MACs | original | before | after | epochs | seed | command | on"
    return f"""## Every run with training

With the original as teacher; epochs of the search and of fine-tuning; accuracy before and after fine-tuning.

{markdown(header, rows)}"""


def _run(network: str, contender: str, row: Row, epochs: tuple[int, int], seed: int) -> list[str]:
    """One run as a row."""
    figures = [f"{100 * row['macs_kept']:.1f} %", *(f"{row[figure]:.2f}" for figure in ("original", "before", "after"))]
    command = row["command"].removesuffix(" --resume")
    told = f"{epochs[0]} + {epochs[1]}", str(seed), f"`{command}`", _machine(row)
    return [NAMES[network], CONTENDERS.get(contender, contender), *figures, *told]


def _fcf() -> str:
    """The time tables of its README."""
    found, counted = read("fcf_time")["rows"], read("counts")["fcf"]
    whole = []
    for rate, (flops, time, conv_flops, conv_time) in papers.FCF.items():
        own = [found.get(f"whole {flops:.2f} batch {batch}") for batch in (1, 16)]
        cells = [[f"{row[key]:.1f}" if row else NOT_RUN for row in own] for key in ("time_cut", "convolutions_time_cut")]
        _, count, pruned = counted[rate]
        printed = [f"{flops:.2f}", f"{count:.2f}", f"{conv_flops:.2f}", f"{pruned:.2f}"]
        whole.append([rate, *printed, f"{time:.2f}", *cells[0], f"{conv_time:.2f}", *cells[1]])
    layers = []
    for flops, (standard, squeeze) in papers.FCF_LAYER.items():
        own = [found.get(f"layer {flops:.2f} batch {batch}") for batch in (1, 16)]
        cells = [[f"{row[key]:.1f}" if row else NOT_RUN for row in own] for key in ("standard_time_cut", "squeeze_time_cut")]
        layers.append([f"{flops:.2f}", f"{standard:.2f}", *cells[0], f"{squeeze:.2f}", *cells[1]])
    here = "here, batch 1 | batch 16"
    header = f"rate | FLOPs | counted here | convolutions' FLOPs | counted here | time | {here} | convolutions' time | {here}"
    rounds, command = {row["repeats"] for row in found.values()}, read("fcf_time")["command"].removesuffix(" --resume")
    return f"""## FCF (Li et al., CVPR 2019)

Its README's times of ResNet-34 on a CPU: percent less than the whole network takes. The accuracies of the paper could not be
found. FLOPs are counted at their rates with their counter; times are of networks with as many MACs less as theirs have FLOPs.

{markdown(header, whole)}
A layer alone, as a standard convolution of the smaller width and as the paper's squeeze layer:

{markdown(f"FLOPs | standard | {here} | squeeze | {here}", layers)}
`{command}`, medians of n = {", ".join(map(str, sorted(rounds)))} rounds,
{_machine(read("fcf_time"))}, while other programs were running: the times scatter widely, and a saving in time above that in
FLOPs is to be doubted.
"""


def _linearconv() -> str:
    """Counts and accuracies on CIFAR-10."""
    counted, rows = read("counts")["linearconv"], []
    for key, paper in papers.LINEARCONV.items():
        for index, variant in enumerate(("plain", "full", "rank 10")):
            own = counted[key][variant]
            change = f"{paper.accuracy[0]:.1f} %" if index == 0 else f"{paper.accuracy[index]:+.1f}"
            sizes = [
                f"{paper.params[index]:.2f}",
                f"{own['params'] / 1e6:.2f}",
                f"{paper.flops[index]:.3f}",
                f"{own['flops'] / 1e9:.3f}",
            ]
            rows.append([paper.name, variant, *sizes, change])
    header = "network | kernels | parameters, M | counted here | FLOPs, 10⁹ | counted here | CIFAR-10"
    return f"""## LinearConv (Kahatapitiya & Rodrigo, WACV 2021)

Half of the filters are combinations of the others, by all coefficients or by a matrix of rank 10. FLOPs hold the making of the
kernels, once. The accuracy of CIFAR-10 and its change are the paper's. None of them was run here: there are no such networks
trained on these images, and the paper trains each for 250 to 350 epochs. A ResNet-20 made so is above, and in README.

{markdown(header, rows)}
`python -m benchmarks counts`. FLOPs leave out batch normalisation and activations, a difference of up to 0.02; no reading of the
paper that gives the other figures explains the 3.074 printed for ResNet-18.
"""


def _csg() -> str:
    """Counts, and the authors' files."""
    counted, rows = read("counts")["csg"], []
    for key, (name, plain, *coded) in papers.CSG.items():
        rows.append([name, "plain", f"{plain:,}", f"{counted[key]['plain']:,}", "–", "–"])
        for codes, theirs in zip(("16x16, 128", "12x12, 72"), coded, strict=True):
            cells = (f"{count:,}" for pair in zip(theirs, counted[key][codes], strict=True) for count in pair)
            rows.append([name, codes.replace("x", " x "), *cells])
    found = read("csg_files").get("rows", {})
    files = []
    for file, (name, codes, recorded) in papers.CSG_FILES.items():
        own = found.get(file)
        told = _machine(own) if own else WAITING if file in LEAST else f"{NOT_RUN}: the file is not here"
        files.append([name, codes, f"`{file}`", f"{recorded:.2f}", f"{own['accuracy']:.2f}" if own else "–", told])
    header = "network | slices and codes | parameters, authors' code | counted here | without generator | counted here"
    return f"""## CSG (Omidvar et al., AISTATS 2021)

The paper's tables could not be read; these are its authors' code and files. Parameters:

{markdown(header, rows)}
The files as they are, trained by the authors on the images as they were published (`python -m benchmarks csg_files`):

{markdown("network | slices and codes | file | accuracy it records | on the JPEG images here | on", files)}"""


def _hetconv() -> str:
    """The table of VGG-16."""
    vgg = read("vgg")["rows"]
    here = {parts: f"{vgg[name]['after']:.2f}" for parts, name in {"1": "control", "4": "hetconv"}.items()}
    lengths = " and ".join(str(vgg[name]["settings"]["epochs"]) for name in ("trained", "hetconv"))
    rows = []
    for parts, (flops, accuracy) in papers.HETCONV.items():
        own = read("counts")["hetconv"][parts]
        counts = [f"{int(own['flops'] / 1e4) / 100:.2f}", f"{own['executed'] / 1e6:.2f}", f"{own['params'] / 1e6:.2f}"]
        rows.append([parts, f"{flops:.2f}", *counts, f"{accuracy:.2f}", here.get(parts, NOT_RUN)])
    header = "P | FLOPs, M | counted here | executed, M | parameters, M | accuracy, % | accuracy here"
    return f"""## HetConv (Singh et al., CVPR 2019)

VGG-16 on CIFAR-10; the paper's tables of ResNets and ImageNet could not be read. Here, {lengths} epochs of training: of the
network from nothing ({vgg["trained"]["after"]:.2f} %), then of it, and of what `compress --method hetconv --set parts=4` made of
it (`python -m benchmarks vgg`; {_machine(vgg["hetconv"])}, n = 1). A ResNet-20 made so is above.

{markdown(header, rows)}
`python -m benchmarks counts`. The formula of the paper skips the 1 x 1 kernels that a filter's own part covers; what is executed
holds them where P is above 2.
"""


def _runtimes() -> str:
    """Large networks by all five methods."""
    found, rows = read("runtimes").get("rows", {}), []
    for network in NETWORKS:
        for method in (rate.method for rate in papers.RATES.values()):
            row = found.get(f"{network} {method}")
            if row is None or "failed" in row:
                cells = ["–"] * 6 + [WAITING if row is None else f"refused: {row['failed']}"]
            else:
                cells = [f"{100 * row[share]:.1f} %" for share in ("macs_kept", "params_kept")]
                cells += [f"{own['share_ms']:.2f} of {own['original_ms']:.1f} ms" for own in (*row["pytorch"], *row["onnx"])]
                cells.append(f"n = {row['repeats']}, {_machine(row)}")
            rows.append([NAMES[network], method, *cells])
    header = "network | method | MACs | parameters | PyTorch, batch 1 | batch 16 | ONNX Runtime, batch 1 | batch 16 | run here"
    return f"""## Time, in PyTorch and ONNX Runtime

At half the MACs (linearconv and csg: half the parameters, and the same computation), random weights, as a share of the whole
network's time (`python -m benchmarks runtimes`; what Torch-Pruning's networks take is in README).

{markdown(header, rows)}"""


# Runs


def _runs(network: str) -> list[Row]:
    """Those of `finetune` with all images, each with the machine that it was made on."""
    found = read(f"finetune-{network}")
    rows = [{"machine": found["machine"]} | row for row in found.get("rows", {}).values()]
    return [row for row in rows if row["run"]["limit"] is None]


def _of(network: str, contender: str, ratio: float, epochs: int) -> list[Row]:
    """The campaign's runs of a contender with so many epochs, of all seeds."""
    found = []
    for row in _runs(network):
        run = Run(**{**row["run"], "set": tuple(row["run"]["set"])})
        if run == planned(network, contender, ratio, epochs, seed=run.seed):
            found.append(row)
    return found


def _difference(rows: list[Row], others: list[Row]) -> float | None:
    """Points that the rows are above the others, in the mean of the seeds that both have."""
    after = {row["run"]["seed"]: row["after"] for row in others}
    found = [row["after"] - after[row["run"]["seed"]] for row in rows if row["run"]["seed"] in after]
    return statistics.mean(found) if found else None


def _mean(rows: list[Row]) -> float:
    return statistics.mean(float(row["after"]) for row in rows)


def _spread(values: list[float]) -> str:
    """Their mean, and the deviation of several."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _told(rows: list[Row]) -> str:
    """How long, how many, where."""
    return f"{rows[0]['run']['epochs']} epochs, n = {len(rows)}, {_machine(rows[0])}"


def _machine(row: Row) -> str:
    machine = row["machine"]
    device = machine.get("device", "cpu")
    where = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if device == "cpu" else device
    return f"{where}, torch {machine['torch']}"
