"""The order of imports: a module imports only from its own room and from rooms below it, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "shim" / "balance_shim"
# Top floor first. A room is a folder of the package or a module beside the folders.
ROOMS = (
    "__main__", "cli", "doctor", "arming", "excepthook", "status_report", "seams", "modes", "pipeline", "zero",
    "training", "simulation", "monitoring", "report", "planning", "plan_options", "placement", "memory", "logits",
    "replicas", "upstream", "training_run", "patching", "copies", "devices", "device", "eligible_devices",
    "state", "settings", "setting_values", "zero_config_file", "zero_support", "device_spec", "map_file", "optimizers",
    "expandable_segments", "cache", "timing", "virtual", "device_rules", "language", "output", "processes", "rng",
    "versions", "units", "errors", "log", "choices",
)  # fmt: skip


def _modules() -> dict[str, Path]:
    """Return the path of each module by its name in the package; the package itself, which all may import, is ""."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "injection" not in parts:
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules()


def _imports(name: str) -> Iterator[tuple[str, int]]:
    """Yield the modules of the package that module `name` imports, in functions too, with the line."""
    path = MODULES[name]
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        elif (node.module or "").split(".")[0] == PACKAGE.name:
            base = node.module.split(".")[1:]
        else:
            continue
        source = ".".join(part for part in base if part)
        for alias in node.names:
            member = f"{source}.{alias.name}".lstrip(".")
            yield member if member in MODULES else source, node.lineno


def test_every_room_has_a_place():
    """The list names each room once."""
    assert sorted(ROOMS) == sorted({name.split(".")[0] for name in MODULES if name})


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_below(room):
    """Function-level imports included."""
    above = ROOMS[: ROOMS.index(room)]
    upward = [
        f"{name}, line {line}: {imported}"
        for name in MODULES
        if name.split(".")[0] == room
        for imported, line in _imports(name)
        if imported.split(".")[0] in above
    ]
    assert not upward


def test_no_import_circles():
    """Whoever follows imports never comes back."""
    graph = {name: {target for target, _ in _imports(name) if target not in ("", name)} for name in MODULES if name}
    while graph:
        leaves = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert leaves, f"in circles: {sorted(graph)}"
        for name in leaves:
            del graph[name]
