"""Imports point down only, each heavy library has one door, and ``import polarpack`` is light."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [name for name in ("polarpack", "polarpack_image") if (ROOT / name).is_dir()]

# What each room of polarpack stands directly on; it may also use whatever that stands on. A room is
# a module or subpackage of polarpack. A new one gets its line here, or the test fails.
STANDS_ON = {
    "errors": [],
    "_threads": [],
    "_arrays": ["errors"],
    "_glove": [],
    "_numba": [],
    "_cuda": ["_arrays"],
    "entropy": ["_arrays", "_threads", "_numba"],
    "container": ["errors"],
    "clustering": ["_arrays", "_threads", "_numba", "_cuda"],
    "rotation": ["_arrays", "_threads"],
    "scalar": ["_arrays", "_threads", "_numba"],
    "frames": ["clustering", "rotation"],
    "residual": ["clustering", "rotation", "scalar", "entropy"],
    "product": ["residual"],  # its heads are residual quantizers, of one stage in plain PQ
    "trellis": ["clustering", "rotation", "scalar", "entropy"],
    "bitshift": ["clustering", "entropy"],
    "polar": ["frames", "product", "trellis", "bitshift", "container"],
    "batches": ["_arrays"],
    "integrations.files": ["batches"],
    "sources": ["integrations.files"],
    "metrics": ["_arrays"],
    "search": ["scan"],
    "scan": ["polar"],
    "to_faiss": ["polar"],
    "presets": ["polar"],
    "planner": ["presets", "metrics", "sources"],
    "blocks": ["polar", "metrics"],
    "reading": ["blocks", "search", "to_faiss"],
    "writing": ["reading", "sources"],
    "streaming": ["planner", "writing"],
    "merging": ["reading"],
    "codec": ["planner", "writing"],
    "peers": ["_arrays"],
    "comparison": ["codec", "peers"],
    "nn": ["planner", "search"],
    "__init__": ["comparison", "merging", "streaming"],
    "integrations": ["__init__", "nn"],
    "inspection": ["__init__"],
    "demo": ["comparison", "_glove"],
    "cli": ["inspection", "demo", "integrations"],
}
# polarpack_image uses polarpack's public rooms only.
IMAGE_MAY_USE = {
    "__init__",
    "_numba",
    "_threads",
    "errors",
    "entropy",
    "trellis",
    "container",
    "nn",
}

# Heavy libraries, and the only modules that may import them, also inside functions.
DOORS = {
    # peers: its codecs; sklearn: the assignment of large k-means
    "faiss": {"clustering", "to_faiss", "peers", "integrations.sklearn"},
    "numba": {"_numba"},
    # reading hands back tensors that came from torch
    "torch": {"nn", "integrations", "_cuda", "reading"},
    "ray": {"integrations.ray"},
    "sklearn": {"integrations.sklearn"},
    "pyarrow": {"integrations.arrow", "integrations.files", "integrations.ray"},
    "safetensors": {"integrations.safetensors", "integrations.files"},
    "matplotlib": {"comparison", "nn.usage"},
    "PIL": set(),
}


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package's ``__init__`` has its name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, on_load: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that the module imports, with their lines: anywhere in its text, inside
    functions too, or only what loading it imports."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if on_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:  # `from . import rotation` names a module, or an object in one
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).rpartition(".")[2]
            target = node.args[0]
            if function in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield str(target.value), node.lineno


def room(name: str) -> str:
    """The line of ``STANDS_ON`` a module of polarpack belongs to."""
    inner = name.partition(".")[2] or "__init__"
    return inner if inner in STANDS_ON else inner.split(".")[0]


def below(start: str) -> set[str]:
    """The rooms that ``start`` may use."""
    reached: set[str] = set()
    waiting = list(STANDS_ON[start])
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += STANDS_ON[current]
    return reached


def test_the_table_itself_has_no_cycle():
    order = list(TopologicalSorter(STANDS_ON).static_order())
    assert set(order) == set(STANDS_ON)


def test_every_module_has_a_room():
    homeless = [n for n in MODULES if n.startswith("polarpack.") and room(n) not in STANDS_ON]
    assert not homeless, f"give these a line in STANDS_ON: {homeless}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    inside = name.split(".")[0] == "polarpack"
    allowed = below(room(name)) | {room(name)} if inside else IMAGE_MAY_USE
    wrong = set()
    for target, line in imports(name):
        if target.split(".")[0] == "polarpack" and room(target) not in allowed:
            wrong.add(f"line {line}: {target}")
        if target.split(".")[0] == "polarpack_image" and inside:
            wrong.add(f"line {line}: {target}")
    assert not wrong, f"{name} may use only {sorted(allowed)}: {sorted(wrong)}"


def test_loading_goes_in_no_circle():
    graph = {
        name: {target for target, _ in imports(name, on_load=True) if target in MODULES} - {name}
        for name in MODULES
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", DOORS)
def test_one_door(library):
    wrong = []
    for name in MODULES:
        package, _, inner = name.partition(".")
        doors = DOORS[library] if package == "polarpack" else None
        if doors is None and library in ("torch", "PIL", "numba", "matplotlib"):
            continue  # polarpack_image has networks, pictures, kernels and plots of its own
        if any(inner == door or inner.startswith(f"{door}.") for door in doors or ()):
            continue
        wrong += [
            f"{name} line {line}"
            for target, line in imports(name)
            if target.split(".")[0] == library
        ]
    assert not wrong, f"{library} belongs in {sorted(DOORS[library])} only: {wrong}"


def test_import_polarpack_is_light(record_property):
    heavy = [*DOORS, "scipy", "pandas", "typer", "rich"]
    script = (
        "import sys, time; start = time.perf_counter(); import polarpack; "
        "seconds = time.perf_counter() - start; "
        f"print(seconds, [name for name in {heavy} if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        child = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
        )
        figure, _, loaded = child.stdout.partition(" ")
        assert loaded.strip() == "[]", f"import polarpack loads {loaded}"
        seconds.append(float(figure))
    median = statistics.median(seconds)
    record_property("import_seconds", median)
    print(f"import polarpack: {median:.2f} s (aim 0.5)")
    assert median < 1.0
