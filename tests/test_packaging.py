"""What is installed, shipped and promised: wheel, sdist, image, pins, import rules, the table of papers."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def _shipped_names() -> set[str]:
    """Every Python file and every YAML that a user of the wheel must get, by its path inside the package."""
    own = [path.relative_to(ROOT) for path in (ROOT / "moa_lightning").rglob("*.py")]
    linked = [
        Path("moa_lightning") / path.relative_to(ROOT)
        for folder, pattern in (("callbacks", "*.py"), ("configs", "*.yaml"))
        for path in (ROOT / folder).rglob(pattern)
    ]
    return {path.as_posix() for path in [*own, *linked]} | {"moa_lightning/py.typed"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("moa_lightning", "callbacks", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _build(source: Path, what: str, into: Path) -> Path:
    command = [sys.executable, "-W", "error::UserWarning", "-c", BUILD, what, str(into)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


def _wheel_names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("moa_lightning/")}


def test_wheel_and_sdist_hold_callbacks_and_configs(source: Path, tmp_path: Path) -> None:
    expected = _shipped_names()
    assert "moa_lightning/callbacks/__init__.py" in expected
    assert any(name.startswith("moa_lightning/configs/") for name in expected)
    assert _wheel_names(_build(source, "build_wheel", tmp_path)) == expected

    sdist = _build(source, "build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for member in archive if (name := member.name) and member.isfile()}
        # Python before 3.11.4 does not know the argument, later ones ask for it.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert expected <= files
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert _wheel_names(_build(unpacked, "build_wheel", tmp_path / "again")) == expected


def test_the_installed_package_is_this_checkout_and_reaches_callbacks() -> None:
    code = "import moa_lightning.callbacks as c, moa_lightning as m; print(m.__file__, c.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    package, callbacks = (Path(line).resolve() for line in done.stdout.splitlines())
    assert package.parent == ROOT / "moa_lightning"
    assert callbacks.parent == ROOT / "callbacks"


def test_links_into_the_package_are_committed_as_relative_links() -> None:
    for name in ("callbacks", "configs"):
        link = ROOT / "moa_lightning" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_version_is_written_once() -> None:
    import moa_lightning

    assert version("moa-lightning") == moa_lightning.__version__
    assert moa_lightning.__version__ in (ROOT / "CHANGELOG.md").read_text()


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_environment_is_the_pinned_one() -> None:
    wrong = {}
    for name, pinned in _pins().items():
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:  # a pin for another extra or platform
            continue
        if found != pinned:
            wrong[name] = f"{found}, pinned {pinned}"
    assert not wrong


def test_every_direct_dependency_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(r for group in extras.values() for r in group)]
    names = {re.split(r"[\[<>=~!; ]", requirement)[0].lower() for requirement in requirements} - {PROJECT["name"]}
    assert names <= {name.lower().replace("_", "-") for name in _pins()}


def _instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def test_image_installs_what_make_installs() -> None:
    pip = [
        re.findall(r"pip install (.*)", arguments)[0]
        for word, arguments in _instructions()
        if word == "RUN" and "pip install" in arguments
    ]
    assert pip == ["-c constraints.txt \"$(grep '^torch==' constraints.txt)\"", "-c constraints.txt '.[quant]'"]
    makefile = (ROOT / "Makefile").read_text()
    assert "TORCH  := $(shell grep '^torch==' constraints.txt)" in makefile
    assert re.search(r"pip install .*-c constraints\.txt", makefile)
    assert makefile.index("'$(TORCH)'\n") < makefile.index("-e '.[test,dev,docs]'")


def test_image_copies_what_exists_and_runs_moa_without_privileges() -> None:
    instructions = _instructions()
    words = [word for word, _ in instructions]
    assert set(words) <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-runtime-ubuntu[\d.]+", instructions[0][1])
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for word, arguments in instructions if word == "COPY" for name in arguments.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert ("ENTRYPOINT", '["moa"]') in instructions
    assert PROJECT["scripts"] == {"moa": "moa_lightning.cli:main"}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_the_distributed_modules_import_torch_distributed() -> None:
    """import-linter sees other packages as a whole, so it cannot tell torch.distributed from torch."""
    allowed = {*(ROOT / "moa_lightning/distributed").glob("*.py"), ROOT / "moa_lightning/models/sharding.py"}
    files = [*(ROOT / "moa_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    found = {path for path in files if any(name.startswith("torch.distributed") for name in _imported(path))}
    assert ROOT / "moa_lightning/distributed/collectives.py" in found, "the search itself is broken"
    assert found <= allowed


def test_functional_imports_only_torch_and_numerical_libraries() -> None:
    standard = sys.stdlib_module_names
    for path in (ROOT / "moa_lightning/functional").glob("*.py"):
        foreign = {name.partition(".")[0] for name in _imported(path)} - standard
        assert foreign <= {"torch", "moocore", "numpy", "scipy", "moa_lightning"}, path.name


def test_no_function_of_a_combiner_has_a_long_body() -> None:
    """A file is as long as its subject; a body that does not fit into one look is what is hard to read."""
    files = sorted((ROOT / "moa_lightning/combiners").rglob("*.py"))
    lengths = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] or node.body  # without the docstring
                lengths[f"{file.name}:{node.name}"] = (body[-1].end_lineno or 0) - body[0].lineno + 1
    assert len(files) > 20
    assert len(lengths) > 100, "the search itself is broken"
    assert {name: length for name, length in lengths.items() if length > 30} == {}


def test_a_file_is_all_that_a_new_combiner_takes(tmp_path: Path) -> None:
    """In a copy of the package: found by its name on the command line, and by what looks for combiners."""
    shutil.copytree(ROOT / "moa_lightning", tmp_path / "moa_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "moa_lightning/combiners/linear.py").read_text()
    (tmp_path / "moa_lightning/combiners/mine.py").write_text(text.replace("class Linear(", "class Mine("))
    look = "import inspect, moa_lightning.combiners as c; print([n for n, _ in inspect.getmembers(c, inspect.isclass)])"
    config = ["fit", "--config", str(ROOT / "configs/demo.yaml"), "--model.combiner=Mine", "--print_config"]

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([sys.executable, "-c", *arguments], check=True, **options).stdout

    assert "'Mine'" in python(look)
    printed = python("from moa_lightning.cli import main; main()", *config)
    assert re.search(r"class_path: moa_lightning\.combiners\.\S*Mine$", printed, re.MULTILINE)


def test_private_names_of_lightning_stand_in_one_file() -> None:
    private = re.compile(r"\b(?:trainer|fit_loop|epoch_loop|val_loop|loop|connector|\w+_connector)\._[a-z]\w*")
    found = {
        path.name
        for folder in ("moa_lightning", "callbacks")
        for path in (ROOT / folder).rglob("*.py")
        if private.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"lightning_private.py"}
