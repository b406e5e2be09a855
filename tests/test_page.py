"""Pages and Markdown of reports: their figures are those of the JSON, and nothing from a file becomes markup or code."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from networks import named
from test_cli import one_line, run
from test_report import text_of
from test_schemas import SCHEMAS

from compactcli import compare, page, redundancy, report, tables
from compactcli.artefact import open_model
from compactcli.commands import command_line
from compactcli.markdown import comparison_markdown, report_markdown
from compactcli.page import charts, figures
from compactcli.pareto import NOISE, optimal

HOSTILE = "[/red]\"'><script>alert(1)</script><img src=x onerror=alert(1)>`|*_&lt;"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


class Page(HTMLParser):
    """What a parser makes of a page: its elements, their attributes, and the text in each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    @property
    def document(self) -> dict[str, Any]:
        """The JSON that the page holds."""
        return json.loads(self.texts["script"][0])

    @property
    def labels(self) -> list[str]:
        """What the marks of its charts tell."""
        return [str(attributes["aria-label"]) for _, attributes in self.elements if attributes.get("role") == "img"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A network, two that were made of it, and the epochs of a training."""
    folder = tmp_path_factory.mktemp("page")
    torch.save(named("cifar:resnet8", width=8, in_channels=1).state_dict(), folder / "net.pt")
    for name, options in (("small", ("0.6", "--set", "mode=decompose")), ("tiny", ("0.4",))):
        result = run(
            "compress", folder / "net.pt", "--method", "hinge", "--ratio", *options, "-o", folder / f"{name}.safetensors"
        )
        assert result.exit_code == 0, result.stderr
    epoch = {"images_per_second": 80.0, "seconds": 2.0, "lr": 0.05}
    epochs = [
        {"stage": "search", "epoch": 0, "loss": None, "accuracy": 12.5, "validation_loss": None, **epoch},
        {"stage": "search", "epoch": 1, "loss": 1.25, "accuracy": 61.5, "validation_loss": 1.125, **epoch},
        {"stage": "finetune", "epoch": 1, "loss": 0.75, "accuracy": 71.25, "validation_loss": 0.875, **epoch},
    ]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in epochs))
    return folder


@pytest.fixture(scope="module")
def made(folder) -> tuple[dict[str, Any], Path]:
    """(what --json printed, the page that the same command wrote)."""
    path = folder / "small.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "LATENCY_SECONDS", 0.01)
        beside = ("--baseline", folder / "net.pt", "--data", "digits", "--limit", "30", "--history", folder / "epochs.jsonl")
        result = run("report", folder / "small.safetensors", *beside, "--json", "--html", path)
    assert result.exit_code == 0, result.stderr
    assert f"wrote {path.stat().st_size:,} bytes to" in result.stderr
    return json.loads(result.stdout), path


@pytest.fixture(scope="module")
def compared(folder) -> tuple[dict[str, Any], Path]:
    path = folder / "compared.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "LATENCY_SECONDS", 0.01)
        names = [folder / name for name in ("net.pt", "small.safetensors", "tiny.safetensors")]
        result = run("report", *names, "--data", "digits", "--limit", "30", "--json", "--html", path, "-q")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), path


# The page of one network


def test_the_page_holds_what_json_prints(made):
    tree, path = made
    held = Page(path.read_text()).document
    assert held["report"] == tree
    assert list(Draft202012Validator(SCHEMAS["page"]).iter_errors(held)) == []


def test_the_figures_on_the_page_are_those_of_the_json(made):
    tree, path = made
    found = Page(path.read_text())
    told = " ".join(found.texts["p"])
    for key in ("params", "flops", "size_bytes"):
        assert f"{tree['model'][key]:,}" in told
        assert f"was {tree['baseline'][key]:,}" in told
    for key, ratio in (("params", "params"), ("macs", "macs"), ("size_bytes", "size_bytes"), ("latency_ms", "latency")):
        assert f"{100 * tree['model'][key] / tree['baseline'][key]:.1f} % kept" in told, ratio
    assert f"{tree['model']['accuracy']:.2f} %" in found.texts["p"]
    assert f"{tree['accuracy_delta']:+.2f} points" in found.texts["p"]
    assert f"{tree['model']['latency_ms']:,.2f} ms" in found.texts["p"]
    cells = found.texts["td"]
    for key in ("params", "macs", "flops"):
        assert {f"{tree[side][key]:,}" for side in ("model", "baseline")} <= set(cells)
    for layer in tree["layers"]:
        for key, name in (("macs", "MACs"), ("params", "Parameters")):
            start = f"{layer['name']}: {layer['before'][key]:,} {name} before, {layer['after'][key]:,} after"
            assert sum(label.startswith(start) for label in found.labels) == 1
    (command,) = found.texts["code"][:1]
    assert command == "compactcli compress --method hinge --ratio 0.6 --set mode=decompose"


def test_bars_are_as_high_as_the_figures(made):
    tree, path = made
    found = [attributes for _, attributes in Page(path.read_text()).elements]
    for kind in ("before", "after"):
        heights = [float(str(each["height"])) for each in found if each.get("class") == kind and "height" in each]
        macs = [layer[kind]["macs"] for layer in tree["layers"]]
        top = max(macs) / max(heights[: len(macs)])
        assert heights[: len(macs)] == pytest.approx([each / top for each in macs], abs=1e-3)


def test_how_alike_filters_are_is_what_analyze_says(made, folder):
    _, path = made
    held = Page(path.read_text()).document
    for side, name in (("before", "net.pt"), ("now", "small.safetensors")):
        network = open_model(folder / name)
        assert len(held["likeness"][side]) == 7  # convolutions
        for each in held["likeness"][side]:
            weight = network.module.get_submodule(each["part"]).weight
            alike = redundancy.of(weight)
            assert each["mean"] == pytest.approx(alike.max_abs_corr)
            assert each["filters"] == len(weight)
            assert each["levels"] == sorted(each["levels"], reverse=True)


def test_norms_are_those_of_the_matrices_in_the_file(made, folder):
    _, path = made
    network = open_model(folder / "small.safetensors")
    held = Page(path.read_text()).document["norms"]
    assert len(held) > 2
    for each in held:
        matrix = network.module.get_submodule(f"{each['layer']}.1").weight.detach().flatten(1)
        assert each["columns"] == matrix.shape[1]
        assert each["largest"] == pytest.approx(float(matrix.norm(dim=0).max()))
    assert figures.norms(open_model(folder / "net.pt")) == []


def test_curves_are_those_of_the_history(made, folder):
    _, path = made
    found = Page(path.read_text())
    assert found.document["epochs"] == [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert "search epoch 0: validation accuracy 12.5 %" in found.labels
    assert "finetune epoch 1: validation accuracy 71.25 %, training loss 0.75, validation loss 0.875" in found.labels


def test_what_is_not_known_is_left_out(folder):
    network = open_model(folder / "net.pt")
    tree = page.document(report.report(network, None, None), network, None, None)
    text = page.report_page(tree)
    found = Page(text)
    headings = found.texts["h2"]
    assert not {"How it was trained", "What hinge kept"} & set(headings)
    assert "was not measured" in found.texts["p"]
    assert not re.search(r"\b(None|nan)\b", re.sub(r"(?s)<script.*?</script>", "", text))


def test_the_page_reaches_nothing_outside(made, compared):
    for _, path in (made, compared):
        found = Page(path.read_text())
        links = {(tag, key, value) for tag, each in found.elements for key, value in each.items() if key in ("href", "src")}
        assert links == {("link", "href", "data:,")}
        policy = next(str(each["content"]) for tag, each in found.elements if each.get("http-equiv"))
        assert policy.startswith("default-src 'none'")
        assert not re.search(r"https?://|@import|url\(", path.read_text())


# What a file says is text


def hostile(tree: Any) -> Any:
    """The document with something hostile in every word that may come from a file."""
    if isinstance(tree, dict):
        return {key: value if key in ("schema", "pareto", "command") else hostile(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [hostile(value) for value in tree]
    return f"{tree}{HOSTILE}" if isinstance(tree, str) else tree


def shape_of(text: str) -> list[tuple[str, list[str]]]:
    """The elements of a page and the names of their attributes."""
    return [(tag, sorted(attributes)) for tag, attributes in Page(text).elements]


def test_nothing_in_a_file_becomes_markup(made, compared):
    plain, crafted = (Page(made[1].read_text()).document for _ in range(2))
    crafted = hostile(crafted)
    crafted["report"]["steps"][0]["options"] = {HOSTILE: HOSTILE}
    plain["report"]["steps"][0]["options"] = {"mode": "auto"}
    for layer, other in zip(crafted["likeness"]["now"], crafted["norms"], strict=False):
        assert HOSTILE in layer["layer"]
        assert HOSTILE in other["layer"]
    text = page.report_page(crafted)
    assert shape_of(text) == shape_of(page.report_page(plain))
    found = Page(text)
    assert found.document == crafted
    assert found.texts["h1"] == [crafted["report"]["model"]["arch"]]
    assert "<script>alert" not in text
    text = page.comparison_page(hostile(compared[0]))
    assert shape_of(text) == shape_of(compared[1].read_text())
    assert HOSTILE in "".join(Page(text).texts["th"])


def test_nothing_in_a_file_becomes_markdown(made, compared):
    tree = hostile(made[0])
    for crafted, plain in (
        (report_markdown(tree), report_markdown(made[0])),
        (comparison_markdown(hostile(compared[0])), comparison_markdown(compared[0])),
    ):
        cells, wanted = ([len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()] for text in (crafted, plain))
        assert cells == wanted
        assert not re.search(r"(?<!\\)[<>`]", crafted)


def test_nothing_in_a_file_becomes_the_markup_of_tables(made, compared):
    for table in (tables.report_tables(hostile(made[0]), layers=True), compare.table(hostile(compared[0]))):
        assert "[/red]" in text_of(table)


def steering(tree: Any) -> Any:
    """The document with what would steer a terminal, and half a character, in every word."""
    if isinstance(tree, dict):
        return {key: steering(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [steering(value) for value in tree]
    return f"{tree}\x1b[31m\x9b2J\x07\u202e\udcff" if isinstance(tree, str) else tree


def test_nothing_in_a_file_steers_a_terminal(made, compared):
    """Not the commands of the history either: all that people read can be printed."""
    report_, several = steering(made[0]), steering(compared[0])
    texts = [text_of(tables.report_tables(report_, layers=True)), text_of(compare.table(several))]
    for text in (*texts, report_markdown(report_), comparison_markdown(several)):
        assert [char for char in text if not char.isprintable() and char != "\n"] == []
        assert "\N{REPLACEMENT CHARACTER}" in text


def test_a_command_to_paste_is_one_command():
    options = {"ratio": 0.5, "teacher": "x; rm -rf ~", "epochs": 3, "lr": 0.05, "keep": "last"}
    step = {"command": "finetune", "method": None, "options": options}
    assert command_line(step) == "compactcli finetune --epochs 3 --lr 0.05 --teacher 'x; rm -rf ~' --keep last"
    assert command_line({**step, "command": "compress", "method": "$(reboot)"}).startswith(
        "compactcli compress --method '$(reboot)' --ratio 0.5"
    )
    assert command_line({**step, "command": "open", "method": "csg"}) == "open csg"


# Several networks, Markdown


def test_a_comparison_is_of_its_reports(compared):
    tree, path = compared
    found = Page(path.read_text())
    assert found.document == tree
    assert [each["name"] for each in tree["models"]] == ["net.pt", "small.safetensors", "tiny.safetensors"]
    for each in tree["models"]:
        assert {f"{each['model'][key]:,}" for key in ("params", "macs")} <= set(found.texts["td"])
        assert f"{each['model']['accuracy']:.2f} %" in found.texts["td"]
        for cost, key in compare.COSTS.items():
            points = [(other["model"]["accuracy"], other["model"][key]) for other in tree["models"]]
            best = optimal(points, NOISE.get(cost, 0.0))[tree["models"].index(each)]
            assert (cost in each["pareto"]) == best
    marks = [label.rpartition("; ")[2] for labels in found.labels for label in labels.splitlines()]
    assert len(marks) == 9
    assert marks.count("dominated") == sum(3 - len(each["pareto"]) for each in tree["models"]) > 0
    text = run("report", *(path.parent / each["name"] for each in tree["models"]), "-q").stdout
    assert all(f"{each['model']['params']:,}" in text for each in tree["models"])
    assert "give --data" in text


def test_what_all_are_compared_with_has_a_row_unless_it_is_one_of_them(compared, folder):
    tree, path = compared
    assert len(compare.rows(tree)) == 3  # net.pt is the original of the others
    small, tiny, net = (str(path.parent / name) for name in ("small.safetensors", "tiny.safetensors", "net.pt"))
    assert len(compare.rows(json.loads(run("report", small, tiny, "--baseline", net, net, "-q", "--json").stdout))) == 3
    for flags in ((), ("--baseline", str(path.parent / "net.pt"))):
        found = json.loads(run("report", small, tiny, *flags, "-q", "--json").stdout)
        *_, last = compare.rows(found)
        assert len(compare.rows(found)) == 3
        assert last[:2] == ("baseline", f"{tree['models'][0]['model']['params']:,}")
        assert (last[6] == "-") == (not flags)  # a recipe remembers no latency
        for text in (comparison_markdown(found), page.comparison_page(found)):
            assert text.count("baseline |") + text.count(">baseline<") == 1
    other = {**found["models"][1], "baseline": {**found["models"][1]["baseline"], "accuracy": 1.0}}
    assert len(compare.rows({"models": [found["models"][0], other]})) == 2


def test_accuracies_of_other_images_are_not_compared(folder):
    networks = [open_model(folder / name) for name in ("net.pt", "tiny.safetensors")]
    tree = compare.comparison(networks, None, [None, None])
    assert [each["pareto"] for each in tree["models"]] == [[], []]
    assert "give --data" in page.comparison_page(tree)
    assert "give --data" in comparison_markdown(tree)


def test_networks_of_other_inputs_are_not_compared(folder):
    torch.save(named("cifar:resnet8", width=4).state_dict(), folder / "colour.pt")
    line = one_line(run("report", "-q", folder / "net.pt", folder / "colour.pt"))
    assert re.search(r"colour\.pt: takes 3x32x32, .*net\.pt 1x32x32; .*--input-shape", line)


def test_markdown_shows_the_figures(made, folder):
    tree, _ = made
    text = report_markdown(tree)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    for key, label in (("params", "Parameters"), ("macs", "MACs"), ("flops", "FLOPs")):
        (row,) = [row for row in rows if row[0] == label]
        kept = 100 * tree["model"][key] / tree["baseline"][key]
        assert row == [label, f"{tree['baseline'][key]:,}", f"{tree['model'][key]:,}", f"{kept:.1f} %"]
    result = run("report", folder / "small.safetensors", "--markdown", "-q")
    assert result.stdout.startswith(
        "### cifar:resnet8, input 1x32x32\n\n|  | original | now | kept |\n| :-- | --: | --: | --: |\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "--markdown"), "all go to stdout; give one of them"),
        (("--html", "-", "--json"), "all go to stdout; give one of them"),
        (("--history", "epochs.jsonl"), "give one, and --html FILE"),
        (("--html", "net.pt"), "--html net.pt: that is another file of this command"),
        (("--html", "epochs.jsonl", "--history", "epochs.jsonl"), "that is another file of this command"),
        (("-", "-"), "stdin holds one model"),
    ],
)
def test_wrong_usage_of_report(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert message in one_line(run("report", "net.pt", *arguments), 2)


EPOCH = {"epoch": 1, "loss": 0.1, "accuracy": 50.0, "validation_loss": 0.1, "lr": 0.1, "images_per_second": 9.0, "seconds": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", '{"epoch": NaN}', "<html>", '{"epoch": 0, "accuracy": "<b>"}'),
        *("[" * 100_000, json.dumps({**EPOCH, "loss": 10**400}), json.dumps({**EPOCH, "accuracy": None})),
    ],
    ids=lambda text: text[:24],
)
def test_a_history_that_is_none_is_one_line(folder, tmp_path, text):
    (tmp_path / "other.jsonl").write_text(text)
    line = one_line(run("report", folder / "net.pt", "--history", tmp_path / "other.jsonl", "--html", tmp_path / "out.html"))
    assert "other.jsonl is no history of epochs" in line
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (100, "100"), (853018, "853 k"), (2.5e9, "2.5 G"), (0.25, "0.25"), (1234, "1.23 k"), (20, "20")]
)
def test_short_numbers(value, text):
    assert charts.short(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 2_359_296), (86.2, 89.9), (0.07, 0.44), (5, 5), (0, 0)])
def test_ticks_cover_what_they_are_for(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(NUMBERS | st.sampled_from([1.7e308, -1.7e308, 5e-324, 0.0]), min_size=1, max_size=4))
def test_any_numbers_have_a_place_on_a_scale(values):
    """However large or small: a history may be of a training that went wrong."""
    marks = charts.ticks(min(values), max(values))
    assert 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))
    assert all(math.isfinite(mark) for mark in marks)
    assert all(0 <= charts._share(value, marks) <= 1 for value in values)
    assert "nan" not in charts.lines("loss", [""] * len(values), [charts.Series("loss", values)])


# In a real browser


def browse(path: Path, folder: Path) -> tuple[str, str, list[str]]:
    """(the page's elements after its code ran, what was logged to the console, the addresses that the page asked for)."""
    log = folder / "net.json"
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom"]
    environment = {**os.environ, "HOME": str(folder)}
    result = subprocess.run([*command, path.as_uri()], capture_output=True, timeout=60, check=True, env=environment)
    console = [line for line in result.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    # What Chromium asks for by itself has another initiator.
    asked = re.findall(r'"initiator":"null".*?"url":"([^"]+)"', log.read_text(errors="replace"))
    return result.stdout.decode(), "\n".join(console), asked


FRAME = """<!doctype html><iframe width=360 height=800 srcdoc="{page}"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const inner = frame.contentDocument, chart = inner.querySelector(".marks"), found = [];
  let mark = chart.querySelector("[role=img]");
  mark.focus();
  for (const key of ["ArrowRight", "End", "Home"]) {{
    mark.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {{ key, bubbles: true }}));
    mark = inner.activeElement;
    found.push(mark.getAttribute("aria-label") === inner.querySelector(".tip").textContent && mark.getAttribute("aria-label"));
  }}
  const width = inner.documentElement.scrollWidth, stops = chart.querySelectorAll('[tabindex="0"]').length;
  document.querySelector("pre").textContent = JSON.stringify({{ width, found, stops }});
}};
</script>
"""


@needs_browser
def test_a_browser_shows_the_page_without_an_error_or_a_request(made, compared, tmp_path):
    for number, (tree, path) in enumerate((made, compared)):
        folder = tmp_path / str(number)
        folder.mkdir()
        elements, console, asked = browse(path, folder)
        assert console == ""
        assert asked == []
        assert 'class="tip"' in elements  # its code ran
        held = re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', elements)
        assert held is not None
        document = json.loads(held[1])
        assert document.get("report", document) == tree
        for each in tree.get("models", [tree]):
            for key in ("params", "macs"):
                assert f">{each['model'][key]:,}</td>" in elements


@needs_browser
def test_errors_and_requests_would_be_seen(tmp_path):
    (tmp_path / "page.html").write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'><script>nothing()</script>")
    _, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert "nothing is not defined" in console
    assert asked == ["http://127.0.0.1:9/x.png"]


@needs_browser
def test_a_page_is_as_narrow_as_a_phone_and_moves_by_keys(made, tmp_path):
    tree, path = made
    (tmp_path / "frame.html").write_text(FRAME.format(page=html.escape(path.read_text())))
    elements, console, _ = browse(tmp_path / "frame.html", tmp_path)
    assert console == ""
    result = re.search(r"<pre>(.+?)</pre>", elements)
    assert result is not None
    found = json.loads(html.unescape(result[1]))
    assert found["width"] <= 360
    assert found["stops"] == 1  # for the whole chart
    names = [layer["name"] for layer in tree["layers"]]
    assert [label.partition(":")[0] for label in found["found"]] == [names[1], names[-1], names[0]]
