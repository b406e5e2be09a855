"""The parts of the package stand on each other in one order, and nothing in the repository is of one machine."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import compactcli
from compactcli.methods import names, summary

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "compactcli"
FILES = sorted(PACKAGE.rglob("*.py"))

# DESIGN.md, "The parts": a file imports from its own row and from those above it.
# CONTRIBUTING.md tells the same.
ORDER = [
    {"errors", "recipe", "distributed", "vision", "proximal", "lpbox", "pareto", "usercode"},
    {"graph", "data", "images", "folders", "sources", "augment", "streams", "cifar", "batchnorm", "history", "kernels"},
    {
        "architectures",
        "signatures",
        "detection",
        "checkpoint",
        "foreign",
        "torchfile",
        "peel",
        "pickles",
        "folding",
        "channels",
        "surgery",
        "law",
        "layers",
        "budget",
        "dials",
        "allocate",
        "moments",
        "calibrate",
        "replay",
        "regression",
        "plain",
        "plan",
    },
    {"methods", "measure", "latency", "redundancy", "counters"},
    {"artefact", "weights", "optim", "gradient", "resume", "train", "commands"},
    {
        "compress",
        "finetune",
        "precision",
        "predict",
        "report",
        "compare",
        "markdown",
        "page",
        "analysis",
        "explain",
        "export",
        "sweep",
        "tables",
        "timing",
    },
    {"cli"},
]
ROOF = {"__init__", "__main__"}  # the library on one screen, and `python -m`


def test_contributors_are_told_the_order():
    _, _, told = (ROOT / "CONTRIBUTING.md").read_text().partition("Imports go only this way, and a test holds it:\n\n```\n")
    block = told.partition("```")[0]
    assert [set(re.findall(r"[a-z]+", row)) for row in block.split("<-")] == ORDER


def part(path: Path) -> str:
    """The name of a file, or of the folder that it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def row(name: str) -> int:
    return next(number for number, names_ in enumerate(ORDER) if name in names_)


def imported(path: Path) -> Iterator[str]:
    """The parts of the package that a file imports, on demand and for types as well."""
    package = ("compactcli", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = ".".join([*base, *filter(None, [node.module])])
            modules = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "compactcli" and len(parts) > 1 and parts[1] in set.union(*ORDER):
                yield parts[1]


def test_every_file_has_its_place():
    assert {part(path) for path in FILES} - ROOF <= set.union(*ORDER)
    assert sum(len(names_) for names_ in ORDER) == len(set.union(*ORDER))


@pytest.mark.parametrize(
    "path", [path for path in FILES if part(path) not in ROOF], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_upwards(path):
    wrong = {name for name in imported(path) if row(name) > row(part(path))}
    assert not wrong


def test_the_walk_sees_every_way_to_import(tmp_path, monkeypatch):
    """A file that imports in each way, at the top, in a function and for types."""
    monkeypatch.setattr("test_structure.PACKAGE", tmp_path)
    (tmp_path / "methods").mkdir()
    path = tmp_path / "methods" / "sample.py"
    path.write_text(
        "from .. import artefact\nfrom ..report import report\nimport compactcli.train\nimport torch\n"
        "def f():\n    from compactcli import export\n"
        "if TYPE_CHECKING:\n    from ..cli.common import note\n"
    )
    assert set(imported(path)) == {"artefact", "report", "train", "export", "cli"}


@pytest.mark.parametrize("name", names())
def test_every_method_file_begins_with_its_help(name):
    assert re.fullmatch(r"[^\n]{20,99}\.", summary(name))


def test_every_file_says_what_it_is_for():
    assert [path.name for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_every_public_function_and_class_has_a_docstring():
    missing = []
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert missing == []


def test_what_the_library_offers():
    assert sorted(compactcli.__all__) == [
        *("CompactError", "UsageError", "Wishes", "__version__", "compress", "fit_", "load", "open_model", "save"),
    ]
    assert dir(compactcli) == compactcli.__all__
    assert all(getattr(compactcli, name) is not None for name in compactcli.__all__)
    with pytest.raises(AttributeError, match="module 'compactcli' has no attribute 'nothing'"):
        compactcli.nothing  # noqa: B018


# Folders of one machine's user, of its temporary files or of where this was written, and hosts of package registries.
PLACES = [rb"/(home|Users|root)/[A-Za-z0-9_.-]+/", rb"/tmp/[A-Za-z]", rb"/work/[a-z]", rb"[A-Z]:\\\\?Users", rb"/var/folders/"]
HOSTS = [
    rb"pypi\.org",
    rb"pythonhosted\.org",
    rb"anaconda\.org",
    rb"download\.pytorch\.org",
    rb"index-url",
    rb"artifactory",
    rb"jfrog",
]


def tracked() -> list[Path]:
    """The files that git tracks or would."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("pattern", [*PLACES, *HOSTS], ids=bytes.decode)
def test_nothing_in_the_repository_is_of_one_machine(pattern):
    found = [
        str(path.relative_to(ROOT)) for path in tracked() if path != Path(__file__) and re.search(pattern, path.read_bytes())
    ]
    assert found == []
