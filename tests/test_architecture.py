"""Which room may enter which, pinned."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Package -> what of ours it may import. Nothing turns back, and the two floors never meet.
MAY_IMPORT = {
    "kan_model": set[str](),
    "kan_bundle": set[str](),
    "kan_ops": set[str](),
    "protos": set[str](),
    "export": {"kan_model", "kan_bundle", "kan_ops"},
    "serving": {"protos", "kan_bundle", "kan_ops"},
    "benchmarks": {"kan_model", "kan_bundle", "kan_ops", "protos", "export", "serving"},
}
NOT_DISTRIBUTED = {"benchmarks"}
NEVER = {
    "kan_bundle": {"torch", "onnxruntime", "onnx", "grpc", "model_signing"},
    "serving": {"torch", "onnx", "model_signing"},
    "kan_model": {"onnx", "onnxruntime", "grpc"},
    "kan_ops": {"torch", "onnx", "grpc", "numpy"},
    "export": {"grpc"},
    "protos": {"torch", "onnxruntime"},
    "benchmarks": set[str](),
}


# What the client may have, beside Python's own: it works where the server's dependencies are not.
CLIENT = {
    *("google", "grpc", "grpc_health", "matplotlib", "numpy", "protos", "rich", "serving", "shtab"),
    "kan_bundle",  # of which one module imports nothing
}


def modules(file: Path) -> set[str]:
    """Whole names of every module a file imports, and of what it imports from them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(file: Path) -> set[str]:
    """Top-level names of every module a file imports."""
    return {module.partition(".")[0] for module in modules(file)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for file in files:
        found = imports(file)
        ours = (found & set(MAY_IMPORT)) - {package}
        assert ours <= MAY_IMPORT[package], file
        assert not found & NEVER[package], file


def test_the_rooms_of_export_are_entered_one_way() -> None:
    """The proof trusts nothing of what it proves, and what is shown has no say in it."""
    may_import = {
        "proof": set[str](),
        "conversion": {"proof"},
        "report_page": {"proof", "conversion"},
    }
    rooms = {path.parent.name for path in (ROOT / "export").glob("*/__init__.py")}
    assert rooms == set(may_import)
    for room, others in may_import.items():
        for file in (ROOT / "export" / room).glob("**/*.py"):
            entered = {name.split(".")[1] for name in modules(file) if name.startswith("export.")}
            assert entered & rooms <= others | {room}, file


def test_the_client_and_the_server_know_nothing_of_each_other() -> None:
    client = set((ROOT / "serving" / "client").glob("**/*.py"))
    assert client
    for file in (ROOT / "serving").glob("**/*.py"):
        ours = {module for module in modules(file) if module.startswith("serving.")}
        of_client = {module for module in ours if module.startswith("serving.client")}
        assert of_client == (ours if file in client else set()), file
        if file in client:
            assert imports(file) <= CLIENT | sys.stdlib_module_names, file
            of_bundles = {m for m in modules(file) if m.startswith("kan_bundle.")}
            assert all(m.startswith("kan_bundle.escaping.") for m in of_bundles), file


def test_the_client_imports_no_runtime_and_nothing_of_the_servers_dependencies() -> None:
    absent = {"torch", "onnx", "onnxruntime", "pydantic", "pydantic_settings", "structlog"}
    absent |= {"prometheus_client", "kan_bundle.layout", "kan_ops", "rich", "matplotlib"}
    script = (
        "import sys, serving.client, serving.client.__main__, serving.client.commands;"
        f"sys.exit(' '.join({absent!r} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_is_in_the_table_and_in_the_distribution() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"examples", "tests"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert packages == set(MAY_IMPORT)
    assert packages - NOT_DISTRIBUTED == set(declared["wheel"]["packages"])


def test_the_server_process_never_imports_torch() -> None:
    script = (
        "import sys, serving.__main__, serving.server;"
        "never = {'torch', 'onnx', 'onnxscript', 'cryptography', 'model_signing'};"
        "sys.exit(' '.join(never & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_who_keeps_workers_imports_nothing_that_does_not_survive_a_fork() -> None:
    script = (
        "import sys, serving.__main__, serving.settings, serving.supervisor.server;"
        "sys.exit(' '.join({'grpc', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_are_loaded_and_kept_without_grpc() -> None:
    script = (
        "import sys, serving.models.lifecycle;"
        "sys.exit(' '.join({'grpc', 'serving.service'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_line_of_the_program_registers_libraries() -> None:
    packages = ("export", "kan_bundle", "kan_ops", "serving")
    files = [file for package in packages for file in (ROOT / package).glob("**/*.py")]
    naming = [f for f in files if "register_custom_ops_library" in f.read_text()]
    assert [f.relative_to(ROOT) for f in naming] == [Path("kan_ops/__init__.py")]
