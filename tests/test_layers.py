"""Data flows one way through the package, and no file grows beyond one idea."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "specdec_fast"

# From the user down to what knows of nothing else; a module may import from lower layers, and within its own as long as
# there is no cycle. A new module needs a place here.
LAYERS = (
    {"cli"},
    {"demo", "environment", "cli_verify", "cli_bench", "cli_plan"},
    {"bench", "cli_bench_kernels"},
    {"audit.__init__", "cli_options"},
    {"microbench.report", "microbench.measure"},
    {"microbench.variants"},
    {"microbench.peers"},
    {"microbench.cases", "microbench.clock"},
    {"microbench.__init__"},
    {"audit.greedy", "audit.sampled"},
    {"audit.transform"},
    {"audit.law"},
    {"audit.common", "audit.statistics"},
    {"console"},
    {"__init__"},
    {"plan"},
    {"prepared"},
    {"api"},
    {"loop"},
    {"device_engine", "device_plan", "inputs"},
    {"methods", "engine", "warmup", "device_session", "device_text", "host_model", "host_passes"},
    {"choice", "sources"},
    {"options", "settings"},
    {
        "drafters.__init__",
        "drafters.auto",
        "drafters.base",
        "drafters.begun",
        "drafters.head",
        "drafters.literal",
        "drafters.model",
        "drafters.none",
        "drafters.projection",
        "drafters.prompt_lookup",
        "drafters.slrs",
        "drafters.written",
    },
    {"pictures"},
    {"static_model", "prompt_passes", "runners", "continuation"},
    {"compiled", "device_projection", "device_report"},
    {"device_round", "static_runners"},
    {"static_recurrent", "static_sources"},
    {"device_law", "static_runner"},
    {"encoded", "recurrent"},
    {"apart", "encoding"},
    {"outputs"},
    {"branching", "runner", "verification", "fused", "stops", "lookahead", "record", "state", "stats"},
    {"sampling"},
    {"costs", "intersection_mass"},
    {"block", "thinning", "rule", "proposal"},
    {"trees"},
    {"lean", "attention", "masks"},
    {"lean_ops", "fused_layers"},
    {"walk"},
    {"static_cache", "states", "layer_ops", "round_ops"},
    {"cache", "trial", "lean_weights", "memory", "pretrained", "ngram"},
    {"text"},
    {"spelling"},
    {"token_map"},
    {"vocab", "encoder"},
    {"pieces", "byte_level"},
    {"ops", "attention_ops"},
    {"dispatch", "reference_ops"},
    {"reference", "randomness"},
    {"native", "staging"},
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("specdec_fast").removeprefix(".") or "__init__" for name in names if ours(name)}
    modules = {name for name in found if name in FILES}
    modules |= {f"{name}.__init__" for name in found if f"{name}.__init__" in FILES}
    if len(modules) > 1:
        # `from specdec_fast import api` runs the package's own file too, which is no dependency of the importer
        modules.discard("__init__")
    return modules


def ours(name: str) -> bool:
    return name == "specdec_fast" or name.startswith("specdec_fast.")


EDGES = {module: imports(path) - {module} for module, path in FILES.items()}


def test_every_module_has_a_layer():
    assert set(FILES) == set(LEVEL), "give the module its place in LAYERS"


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_import_goes_up(module):
    up = {other for other in EDGES[module] if LEVEL[other] < LEVEL[module]}
    assert not up, f"{module} imports from a layer above"


def test_no_cycle():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(EDGES[module]):
            visit(other)
        done.add(path.pop())

    for module in sorted(FILES):
        visit(module)


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_file_holds_two_ideas(module):
    assert len(FILES[module].read_text().splitlines()) <= 500


def test_the_engine_knows_no_method_by_name():
    from specdec_fast.options import METHODS

    for module in ("engine", "runner", "verification", "block", "thinning", "rule", "state", "stops", "sampling"):
        tree = ast.parse(FILES[module].read_text())
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        words = {c.value for node in compared for c in ast.walk(node) if isinstance(c, ast.Constant)}
        assert not words & set(METHODS)


def test_the_walk_sees_what_it_should():
    """The checks above would pass if nothing were found."""
    assert {"methods", "engine", "runner", "cache"} <= EDGES["loop"]
    assert "drafters.model" in EDGES["methods"]
    assert "native" in EDGES["randomness"]
