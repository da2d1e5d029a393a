"""The rooms of the house: who may import whom, what a recipe's file holds, and words that mean one thing."""

import ast
import dataclasses
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from recipes.common.core.cli import recipe_class, recipe_names

ROOT = Path(__file__).parent.parent
FILES = {path: path.relative_to(ROOT) for room in ("zoo", "recipes") for path in sorted((ROOT / room).rglob("*.py"))}
RECIPE_FILES = [
    name
    for name in FILES.values()
    if name.parts[0] == "recipes" and (len(name.parts) == 2 or (len(name.parts) == 3 and name.name == "__init__.py"))
]


def module_of(name):
    return ".".join(name.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(name): path for path, name in FILES.items()}


def imported(path, whole=False):
    """The modules of ours that a file imports when it is loaded; with `whole` also inside functions."""
    name, found = module_of(FILES[path]), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if whole else [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            target = ".".join(filter(None, (base, node.module)))
            found |= {
                f"{target}.{alias.name}" if f"{target}.{alias.name}" in MODULES else target for alias in node.names
            }
    return {module for module in found if module in MODULES} - {name}


def test_the_runtime_never_reaches_the_producers():
    for name, path in MODULES.items():
        if (
            name.partition(".")[0] == "zoo" and name != "zoo.spaces"
        ):  # a Space offers the recipes' base models if it can
            assert not {other for other in imported(path, whole=True) if other.startswith("recipes")}, name


def test_no_circle_of_imports():
    graph = {name: imported(path) for name, path in MODULES.items()}
    done, way = set(), []

    def visit(name):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        way.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(way.pop())

    for name in graph:
        visit(name)


def test_recipes_do_not_import_each_other():
    rooms = {name.replace("-", "_") for name in recipe_names()}
    for name, path in MODULES.items():
        room = name.split(".")[1] if name.startswith("recipes.") else None
        if room in rooms:
            for other in imported(path, whole=True):
                assert other.split(".")[1] not in rooms - {room} or other.startswith("zoo."), f"{name} -> {other}"


def test_what_two_recipes_share_is_shared_by_two():
    """A part that one recipe alone uses belongs to that recipe."""
    graph = {name: imported(path, whole=True) for name, path in MODULES.items()}

    def reached(room):
        found, waiting = set(), [name for name in MODULES if name.split(".")[1:2] == [room]]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += graph[name]
        return found

    users = [reached(name.replace("-", "_")) for name in recipe_names()]
    for part in MODULES:
        if part.startswith("recipes.common.parts."):
            assert sum(part in modules for modules in users) > 1, f"{part} is used by one recipe only"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_its_flags_frozen_and_its_paper(name):
    cls = recipe_class(name)
    assert cls.__dataclass_params__.frozen and cls.arxiv and cls.paper_title and cls.__doc__
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), f"--{field.name} says nothing of itself"
    document = importlib.import_module(cls.__module__).__doc__
    assert cls.arxiv in document and re.search(r"^ +1\. ", document, re.M), "the method's numbered steps"


@pytest.mark.parametrize("name", RECIPE_FILES, ids=str)
def test_a_recipes_file_is_read_at_one_sitting(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 450


def tracked(pattern, *places):
    """Lines of tracked files that match, but for this one."""
    command = ["git", "grep", "-nIiE", pattern, "--", *places, ":!tests/test_structure.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr  # 1: nothing was found
    return found.stdout.splitlines()


def test_nothing_is_cited_that_the_reader_does_not_have():
    assert not tracked(r"\bsheet\b|\bsections? [0-9]|  \[[1-9]\.[0-9]", "zoo/*.py", "recipes/*.py", "tests/*.py")


def test_what_is_compared_with_is_a_baseline():
    assert not tracked(r"\brivals?\b|rival_|_rival", "*.py", "*.md", "*.yaml", ":!zoo/record/migrate.py")
