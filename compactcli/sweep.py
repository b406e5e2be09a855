"""Methods x ratios on one network, on equal terms: the driver of a sweep, its document and its table.

Every row begins with a copy of the same network, is calibrated on the same images, trained in the same way and judged on the
same test images. The document is also what an interrupted sweep goes on from:

    {"schema": "compactcli/sweep/1",
     "model":    {as in report},
     "settings": {"version", "methods", "options", "ratios", "data", "images", "seed", "training": {...} | null},
     "rows":     [{"method", "ratio", "of", "options",
                   "params", "params_materialised", "macs", "macs_synthesis", "size_bytes",
                   "latency_ms", "latency_ratio", "error", "accuracy", "seconds", "reason", "pareto", "identity"}]}

The first row is the original: it has no method. A target that a method cannot reach is a row with a reason and no figures.
`size_bytes` is of the artefact that it would be, `latency_ms` of a batch of 1, `latency_ratio` to the original timed in the
same rounds (a machine is not as fast at one row as at another), `error` of the outputs before any training, `accuracy` on
the test images, `seconds` what compressing and training took. `pareto` names the costs of "params", "macs" and "latency"
(the ratio) for which no other row is as good at less, or better at no more; better is more accurate, or of less output error
where there is no accuracy, and latencies that are near (`pareto.NOISE`) count as equal. `identity` is a digest of all that
makes a row; a row is kept where it is the same.
"""

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from . import __version__, artefact, data, kernels, latency, measure, methods, report
from .artefact import Network
from .compress import Calibration, Target, compress
from .errors import CompactError, UsageError, printable
from .finetune import check, finetune
from .history import Watch
from .optim import Settings
from .pareto import ALIKE, marks
from .tables import title, words
from .train import VALIDATION_LIMIT

SCHEMA = "compactcli/sweep/1"
COSTS = {"params": "params", "macs": "macs", "latency": "latency_ratio"}  # what a row may be the best at -> its figure
FIGURES = (
    *("params", "params_materialised", "macs", "macs_synthesis", "size_bytes"),
    *("latency_ms", "latency_ratio", "error", "accuracy"),
)
ROW = {"method", "ratio", "of", "options", *FIGURES, "seconds", "reason", "pareto", "identity"}


@dataclass(frozen=True)
class Terms:
    """What all rows have in common."""

    calibration: Calibration | None = None  # None: from the weights alone
    dataset: data.Dataset | None = None  # what is trained on and judged by
    settings: Settings = field(default_factory=lambda: Settings(epochs=0))  # the seed of all; 0 epochs: no training
    teacher: Network | None = None
    keep: Literal["best", "last"] = "best"

    @property
    def judged(self) -> bool:
        """Whether there are test images with labels."""
        return self.dataset is not None and self.dataset.test is not None and self.dataset.test.labels is not None

    @cached_property
    def seen(self) -> str:
        """A digest of the images to calibrate on, and of some that are trained on and judged by, with the labels of all."""
        told = hashlib.sha256(b"-" if self.calibration is None else self.calibration.images.contiguous().numpy().data)
        for split in () if self.dataset is None else (self.dataset.train, self.dataset.test):
            told.update(b"-" if split is None else data.digest(split, self.settings.seed).encode())
        return told.hexdigest()

    def training(self) -> dict[str, Any] | None:
        """How rows are trained; None if they are not."""
        if not self.settings.epochs:
            return None
        return {**self.settings.identity(), "teacher": None if self.teacher is None else self.teacher.name, "keep": self.keep}


@dataclass(frozen=True)
class Cell:
    """One method at one ratio."""

    method: str
    options: Any  # the method's dataclass
    ratio: float


def sweep(
    network: Network,
    chosen: Mapping[str, Any],
    ratios: Sequence[float],
    terms: Terms,
    *,
    earlier: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
    detail: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda tree: None,
) -> dict[str, Any]:
    """Compress copies of the network with the methods, by name with their options, to each ratio: schema compactcli/sweep/1.

    Rows of the `earlier` document that this sweep would make again are taken from it, and those of other methods and ratios that
    were made on the same terms stay in it. `save` gets the document whenever there is more of it; `detail` what compressing and
    training tell.
    Raises UsageError for a ratio that is none, CompactError if a weight is not finite or the data does not fit the network.
    """
    targets = sorted({Target(ratio).ratio for ratio in ratios}, reverse=True)
    _check(network, terms)
    known = {row["identity"]: row for row in ([] if earlier is None else earlier["rows"])}
    whole = _identity(network, None, terms)
    model = earlier["model"] if earlier is not None and whole in known else None
    if model is None:
        model, first = _original(network, terms)
        known[whole] = first | {"identity": whole}
    original = known[whole]
    cells = [Cell(name, chosen[name], ratio) for name in sorted(chosen) for ratio in targets]
    others = _others(network, cells, terms, known.values())
    cells = sorted([*cells, *others], key=lambda cell: (cell.method, -cell.ratio))
    wanted = {_identity(network, cell, terms): cell for cell in cells}
    settings = _settings(wanted.values(), terms)

    def document() -> dict[str, Any]:
        rows = [known[identity] for identity in (whole, *wanted) if identity in known]
        marks = pareto(rows)
        rows = [row | {"pareto": own} for row, own in zip(rows, marks, strict=True)]
        return {"schema": SCHEMA, "model": model, "settings": settings, "rows": rows}

    if earlier is not None:
        more = f", {len(others)} of them not asked for now" if others else ""
        log(f"kept {sum(identity in known for identity in wanted)} of {len(wanted)} rows{more}")
    save(document())
    for identity, cell in wanted.items():
        if identity not in known:
            known[identity] = _row(network, cell, terms, original, detail) | {"identity": identity}
            log(f"{cell.method} {cell.ratio:g}: {_told(known[identity])}")
            save(document())
    return document()


def dumps(tree: Mapping[str, Any]) -> bytes:
    """The document as a file holds it."""
    return f"{json.dumps(tree, indent=2, allow_nan=False)}\n".encode()


def loads(text: str, name: str) -> dict[str, Any]:
    """The document that a sweep wrote. Raises CompactError if it is none."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    ours = isinstance(tree, dict) and tree.get("schema") == SCHEMA and _is_model(tree.get("model"))
    rows = tree.get("rows") if ours else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise CompactError(f"{name} is not what a sweep wrote; leave --resume out to begin one")
    return dict(tree)


def _is_row(row: Any) -> bool:
    """Whether that is a row as a document has it: words, and finite numbers where a row has them."""
    if not isinstance(row, dict) or row.keys() != ROW:
        return False
    words = all(row[key] is None or isinstance(row[key], str) for key in ("method", "of", "reason"))
    known = {*FIGURES} - {"error", "accuracy"} if row["reason"] is None else set()
    known |= {"ratio"} if row["method"] is not None else set()
    numbers = all(_is_number(row[key]) or (row[key] is None and key not in known) for key in (*FIGURES, "ratio", "seconds"))
    return words and numbers and isinstance(row["identity"], str)


def _is_model(model: Any) -> bool:
    """Whether that describes a network, as far as tables show it."""
    if not isinstance(model, dict) or not isinstance(model.get("arch"), str):
        return False
    return isinstance(model.get("input_shape"), list) and all(map(_is_number, model["input_shape"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each row the costs for which no other is as good at less, or better at no more; none for one without figures."""
    made = [row for row in rows if row["reason"] is None]
    accurate = all(row["accuracy"] is not None for row in made)

    def good(row: Mapping[str, Any]) -> float:
        if accurate:
            return float(row["accuracy"])
        return -math.inf if row["error"] is None else -float(row["error"])

    best = iter(marks([good(row) for row in made], {name: [row[key] for row in made] for name, key in COSTS.items()}))
    return [[] if row["reason"] is not None else next(best) for row in rows]


def _check(network: Network, terms: Terms) -> None:
    """Raise CompactError for what no row could be made of: better before the work than in every row."""
    artefact.check_finite(network)
    if terms.settings.epochs and terms.dataset is not None:
        check(network, terms.dataset, terms.teacher)
        data.training_parts(terms.dataset, terms.settings.validation_share, VALIDATION_LIMIT, terms.settings.seed)
        if not terms.judged:
            raise CompactError(f"the data {terms.dataset.name} has no test images with labels to judge training by")


def _others(network: Network, cells: Sequence[Cell], terms: Terms, rows: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """What made those of the rows that are of these terms, and of no method with other options than now or ratio asked for."""
    options = {cell.method: cell.options for cell in cells}
    result = []
    for row in rows:
        with contextlib.suppress(CompactError, TypeError, ValueError):
            own = methods.get(row["method"]).Options(**row["options"])
            cell = Cell(row["method"], own, row["ratio"])
            if cell not in cells and options.get(cell.method, own) == own and _identity(network, cell, terms) == row["identity"]:
                result.append(cell)
    return result


def _settings(cells: Iterable[Cell], terms: Terms) -> dict[str, Any]:
    """The document's part that tells how its rows are made."""
    chosen = {cell.method: cell.options for cell in cells}
    return {
        "version": __version__,
        "methods": sorted(chosen),
        "options": {name: methods.get(name)(chosen[name]).recorded() for name in sorted(chosen)},
        "ratios": sorted({cell.ratio for cell in cells}, reverse=True),
        "data": None if terms.dataset is None else terms.dataset.name,
        "images": None if terms.calibration is None else len(terms.calibration.images),
        "seed": terms.settings.seed,
        "training": terms.training(),
    }


def _identity(network: Network, cell: Cell | None, terms: Terms) -> str:
    """A digest of all that makes a row; without a cell the original's.

    But for the machine, so that a sweep can go on on another: latencies count as shares of the original's beside them.
    """
    dataset = terms.dataset
    splits = () if dataset is None else (dataset.train, dataset.test)
    told: dict[str, Any] = {
        "version": __version__,
        "model": network.sha256,
        "recipe": network.recipe.dumps(),
        "data": None if dataset is None else [dataset.name, *(None if split is None else len(split) for split in splits)],
        "seen": terms.seen,
    }
    if cell is not None:
        told |= {
            "method": cell.method,
            "options": repr(cell.options),
            "files": [artefact.file_sha256(path) for path in methods.get(cell.method)(cell.options).files],
            "ratio": cell.ratio,
            "images": None if terms.calibration is None else len(terms.calibration.images),
            "seed": terms.settings.seed,
            "training": terms.training(),
            "device": torch.device(terms.settings.device).type if terms.settings.epochs else None,  # it says the precision
            "teacher": terms.teacher.sha256 if terms.settings.epochs and terms.teacher is not None else None,
        }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _original(network: Network, terms: Terms) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the network as documents describe it, its row)."""
    evaluated = _evaluated(network, terms)
    figures = _figures(network, network, 0.0, None if evaluated is None else evaluated.accuracy.top1)
    row = {**dict.fromkeys(("method", "ratio", "of", "options")), **figures, "seconds": None, "reason": None}
    return report.measured(network, evaluated, figures["latency_ms"]), row


def _row(network: Network, cell: Cell, terms: Terms, original: Mapping[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """What comes of a copy of the network, or why nothing does."""
    method = methods.get(cell.method)(cell.options)
    row = {"method": cell.method, "ratio": cell.ratio, "of": method.of[0], "options": method.recorded()}
    started = time.perf_counter()
    try:
        small = compress(
            network.copied(),
            cell.method,
            method,
            Target(cell.ratio),
            calibration=terms.calibration,
            seed=terms.settings.seed,
            log=log,
        )
        error = small.recipe.steps[-1].error
        if terms.settings.epochs:
            _tune_(small, terms, original, log)
        seconds = time.perf_counter() - started
        accuracy = small.recipe.steps[-1].measures.accuracy
        if not terms.settings.epochs:
            evaluated = _evaluated(small, terms)
            accuracy = None if evaluated is None else evaluated.accuracy.top1
        return {**row, **_figures(small, network, error, accuracy), "seconds": seconds, "reason": None}
    except UsageError:
        raise
    except (CompactError, torch.linalg.LinAlgError) as problem:  # type: ignore[attr-defined]
        reason = " ".join(str(problem).split())
        return {**row, **dict.fromkeys(FIGURES), "seconds": time.perf_counter() - started, "reason": reason}


def _tune_(network: Network, terms: Terms, original: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Train the network; what is known of the original is not measured again."""
    assert terms.dataset is not None
    teacher, source = terms.teacher, network.recipe.source
    if teacher is not None and source is not None and teacher.sha256 == source.sha256 == network.sha256:
        assert terms.dataset.test is not None
        evaluated = {"dataset": terms.dataset.name, "split": "test", "images": len(terms.dataset.test)}
        known = replace(source.measures, accuracy=original["accuracy"], evaluated=evaluated)
        network.recipe = replace(network.recipe, source=replace(source, measures=known))
    guide = None if teacher is None else replace(teacher, sha256=None)
    finetune(network, terms.dataset, terms.settings, teacher=guide, keep=terms.keep, watch=Watch(log))


def _evaluated(network: Network, terms: Terms) -> report.Evaluated | None:
    """Its accuracy on the test images; None if they have no labels."""
    if not terms.judged or terms.dataset is None:
        return None
    return report.evaluate(network, terms.dataset, device=terms.settings.device)


def _figures(network: Network, first: Network, error: float | None, accuracy: float | None) -> dict[str, Any]:
    """The figures of a row, timed beside the first one's network."""
    found = latency.of(
        [kernels.folded(each.module) for each in ((network,) if network is first else (network, first))],
        network.input_shape,
        seconds=report.LATENCY_SECONDS,
        memory_formats=["contiguous"],
    )
    return {
        "params": measure.params(network.module),
        "params_materialised": measure.params_materialised(network.module),
        "macs": measure.macs(network.module, network.input_shape),
        "macs_synthesis": kernels.synthesis_macs(network.module),
        "size_bytes": len(artefact.dumps(network)),
        "latency_ms": found[0].median_ms,
        "latency_ratio": found[0].median_ms / found[-1].median_ms,
        "error": error if error is not None and math.isfinite(error) else None,
        "accuracy": accuracy,
    }


# For people. Absent values are a dash.

COLUMNS = {
    "parameters": ("params", "{:,}", min),
    "MACs": ("macs", "{:,}", min),
    "file, B": ("size_bytes", "{:,}", min),
    "latency": ("latency_ratio", "{:.3f}", min),
    "output error": ("error", "{:.3f}", min),
    "accuracy, %": ("accuracy", "{:.2f}", max),
}


def sweep_table(tree: Mapping[str, Any]) -> RenderableType:
    """The rows as a Rich table, the best figure of each column marked, and what each row is Pareto-optimal for."""
    model, settings, rows = tree["model"], tree["settings"], tree["rows"]
    table = Table(title=words(title(model)), title_justify="left")
    for name in ("method", "kept", *COLUMNS, "seconds", "Pareto for"):
        table.add_column(name, justify="left" if name in ("method", "kept", "Pareto for") else "right", overflow="fold")
    best = {key: _best(rows, key, choose) for key, _, choose in COLUMNS.values()}
    for row in rows:
        whole = row["method"] is None
        figures = [_shown(row[key], form, not whole and row[key] == best[key]) for key, form, _ in COLUMNS.values()]
        kept = "" if whole else f"{100 * row['ratio']:g} % of {row['of']}"
        note = Text(printable(row["reason"] or ", ".join(row["pareto"])), style="bold" if row["pareto"] else "")
        table.add_row(row["method"] or "original", kept, *figures, _shown(row["seconds"], "{:,.1f}"), note)
        if whole:
            table.add_section()
    told = "calibrated" if settings["images"] else "from the weights alone"
    told += f", {settings['training']['epochs']} epochs of fine-tuning" if settings["training"] else ""
    told += f"; latency: to the original's {rows[0]['latency_ms']:,.2f} ms"
    table.caption = f"{told}; *: best of its column; Pareto: no other is as good at less, or better at no more ({ALIKE})"
    table.caption_justify = "left"
    return table


def _best(rows: Sequence[Mapping[str, Any]], key: str, choose: Callable[[Iterator[float]], float]) -> float | None:
    """The best figure of the compressed networks; None if there is none."""
    found = [row[key] for row in rows if row["method"] is not None and row[key] is not None]
    return choose(iter(found)) if found else None


def _shown(value: float | None, form: str, best: bool = False) -> Text:
    """A figure, marked if it is the best."""
    if value is None:
        return Text("-")
    return Text(f"{form.format(value)} *" if best else form.format(value), style="bold" if best else "")


def _told(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    if row["reason"] is not None:
        return str(row["reason"])
    accuracy = "" if row["accuracy"] is None else f"accuracy {row['accuracy']:.2f} %, "
    error = "-" if row["error"] is None else f"{row['error']:.3f}"
    return f"{accuracy}output error {error}, {row['params']:,} parameters, {row['macs']:,} MACs, {row['seconds']:.1f} s"
