"""Whether the tests notice small mistakes: `python -m benchmarks mutants`.

Mutants of the channel analysis, of surgery, the recipe and the budget, drawn with a fixed seed from all places where one can be
made: a comparison, an operator, a condition, a number or a call is another, or a statement is left out. Each is one copy of the
repository, whose tests of that part run until one fails. Required: at least 85 % killed.

A row is written to benchmarks/results/mutants.json the moment a mutant's tests have ended; --resume keeps those there are.

    python -m benchmarks mutants [--count 300] [--seed 0] [--processes 2] [--resume]
"""

import argparse
import ast
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from rich.console import Console
from rich.table import Table

from ._common import ROOT, Row, Rows, add, provenance, rows

LEAST_KILLED = 0.85
PARTS = {  # file: its tests, the faster ones first
    "channels/__init__.py": ("channels", "plain", "surgery", "budget", "hinge"),
    "channels/moves.py": ("channels", "plain", "surgery", "budget", "hinge"),
    "channels/rules.py": ("channels", "plain", "surgery", "budget", "hinge"),
    "channels/walk.py": ("channels", "plain", "surgery", "budget", "hinge"),
    "recipe.py": ("recipe", "streams", "surgery", "artefact", "compress"),
    "law.py": ("plain", "surgery", "soft", "compress"),
    "surgery.py": ("plain", "channels", "recipe", "surgery", "kernels", "compress", "artefact"),
    "budget.py": ("counters", "budget", "hinge", "timing", "squeeze", "compress"),
    "dials.py": ("counters", "budget", "hinge", "timing", "squeeze", "compress"),
}

Change = Callable[[], None]
COMPARISONS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}
OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult},
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/mutants.json."""
    parser = argparse.ArgumentParser(prog="mutants")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the rows there are")
    options = parser.parse_args(arguments)
    made = provenance(" ".join(["python -m benchmarks mutants", *arguments]))
    wanted = drawn(options.count, options.seed)
    left = [each for each in wanted if not (options.resume and _key(*each) in rows("mutants"))]
    workers: Queue[_Worker] = Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        for number in range(options.processes):
            workers.put(_Worker(Path(folder, str(number))))
        first = {tests: path for path, tests in reversed(PARTS.items())}  # a file of each list of tests
        whole = dict(zip(first, pool.map(lambda path: _run(workers, path, None, 900), first.values()), strict=True))
        for tests, answer in whole.items():
            if answer["ended"] != "passed":
                raise SystemExit(f"the tests of {first[tests]} fail as they are: {answer['test']}")

        def one(each: tuple[str, int]) -> None:
            path, number = each
            source, line, text = mutated(path, number)
            answer = _run(workers, path, source, 10 + 2 * whole[PARTS[path]]["seconds"])
            add("mutants", {_key(path, number): {**made, "line": line, "change": text, **answer}}, _judged)
            print(f"{path}:{line}: {text}: {answer['ended']} {answer['test'] or ''}", flush=True)

        list(pool.map(one, left))
        while not workers.empty():
            workers.get().process.kill()
    _show()


class _Worker:
    """A process that runs tests in its own copy of the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        skipped = shutil.ignore_patterns("__pycache__", ".*", "results", "build")
        shutil.copytree(ROOT, folder, ignore=skipped)
        (folder / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
        command = [sys.executable, "-B", str(folder / "benchmarks" / "_mutants_worker.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, path: str, source: str | None, seconds: float) -> Row:
        """How the tests of a file end, with another source for it."""
        target = self.folder / "compactcli" / path
        original = (ROOT / "compactcli" / path).read_text(encoding="utf-8")
        target.write_text(source or original, encoding="utf-8")
        job = {"folder": str(self.folder), "tests": [f"tests/test_{name}.py" for name in PARTS[path]], "seconds": seconds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer: Row = json.loads(self.process.stdout.readline())
        target.write_text(original, encoding="utf-8")
        return answer


def _run(workers: "Queue[_Worker]", path: str, source: str | None, seconds: float) -> Row:
    worker = workers.get()
    try:
        return worker.run(path, source, seconds)
    finally:
        workers.put(worker)


def drawn(count: int, seed: int) -> list[tuple[str, int]]:
    """(file, number of the place in it) of the mutants."""
    every = [(path, number) for path in PARTS for number in range(len(list(_places(_tree(path)))))]
    return random.Random(seed).sample(every, count)


def mutated(path: str, number: int) -> tuple[str, int, str]:
    """(source, line, what was changed) of a file with the change at one place."""
    tree = _tree(path)
    node, change = list(_places(tree))[number]
    before = ast.unparse(node)
    change()
    after = ast.unparse(node)
    text = f"{before}  ->  " + (after if after != before else "left out" if isinstance(node, ast.stmt) else "the contrary")
    return ast.unparse(ast.fix_missing_locations(tree)), node.lineno, text if len(text) <= 300 else f"{text[:299]}…"


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / "compactcli" / path).read_text(encoding="utf-8"))


def _places(tree: ast.Module) -> Iterator[tuple[Any, Change]]:
    """(node to show, what changes it) of every change that can be made, in order."""
    for node in _code(tree):
        match node:
            case ast.Compare():
                for index, operator in enumerate(node.ops):
                    if type(operator) in COMPARISONS:
                        yield node, _item(node.ops, index, COMPARISONS[type(operator)]())
            case ast.BinOp() if type(node.op) in OPERATORS and not _types(node):
                yield node, _field(node, "op", OPERATORS[type(node.op)]())
            case ast.AugAssign() if type(node.op) in OPERATORS:
                yield node, _field(node, "op", OPERATORS[type(node.op)]())
            case ast.BoolOp():
                yield node, _field(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
            case ast.UnaryOp(op=ast.USub()):
                yield node, _field(node, "op", ast.UAdd())
            case ast.UnaryOp(op=ast.Not()):
                yield node, _field(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
            case ast.Constant() if isinstance(node.value, bool):
                yield node, _field(node, "value", not node.value)
            case ast.Constant() if isinstance(node.value, int | float):
                yield node, _field(node, "value", node.value + 1 if isinstance(node.value, int) else 2 * node.value)
            case ast.If() | ast.IfExp():
                shown = node.test
                yield shown, _field(node, "test", ast.UnaryOp(ast.Not(), node.test))
            case ast.comprehension():
                for index, test in enumerate(node.ifs):
                    yield test, _item(node.ifs, index, ast.Constant(True))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield node, _field(node.func, "id", CALLS[name])
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            statements: list[Any] = body if isinstance(body, list) else []
            for index, statement in enumerate(statements):
                if isinstance(statement, ast.Continue | ast.Break | ast.Raise | ast.AugAssign) or _is_call(statement):
                    yield statement, _item(statements, index, ast.Pass())


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """What is run and may be wrong: no annotations, decorators, texts, types or imports for types."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(tree, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Raise):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield child
            yield from _code(child)


def _types(node: ast.BinOp) -> bool:
    """Whether it is a union of types."""
    return isinstance(node.op, ast.BitOr) and any(
        ast.unparse(side).rpartition(".")[2][:1].isupper() or ast.unparse(side) in ("int", "float", "None")
        for side in (node.left, node.right)
    )


def _is_call(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def _field(node: ast.AST, name: str, value: Any) -> Change:
    return lambda: setattr(node, name, value)


def _item(items: list[Any], index: int, value: Any) -> Change:
    return lambda: items.__setitem__(index, value)


def _key(path: str, number: int) -> str:
    return f"{path} {number}"


def _judged(every: Rows) -> Rows:
    return dict(sorted(every.items()))


def _show() -> None:
    every = rows("mutants")
    table = Table("file", "mutants", "killed", "late")
    for path in PARTS:
        own = [row for key, row in every.items() if key.startswith(f"{path} ")]
        table.add_row(path, str(len(own)), *(str(sum(row["ended"] == how for row in own)) for how in ("failed", "late")))
    killed = sum(row["ended"] != "passed" for row in every.values())
    Console(width=120).print(table)
    print(f"{killed} of {len(every)} killed ({killed / max(1, len(every)):.1%}; {LEAST_KILLED:.0%} required)")
