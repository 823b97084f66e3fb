"""Build, install and report as on a user's machine, in throw-away copies."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import nivmf_fast
from nivmf_fast import _backends

ROOT = Path(__file__).parents[1]
INFO = _backends.build_info()
SITE_PACKAGES = sysconfig.get_path("purelib")
NOWHERE = "/nowhere/c++"
CUDA_TORCH = (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists()

needs_setuptools = pytest.mark.skipif(
    int(metadata.version("setuptools").partition(".")[0]) < 77,
    reason="setuptools >= 77 is needed to build without a package index",
)
needs_compiler = pytest.mark.skipif(
    "_C_cpu" not in INFO.get("built", []), reason=f"_C_cpu: {INFO.get('off', 'not built')}"
)
needs_cuda_torch = pytest.mark.skipif(not CUDA_TORCH, reason="this torch is a CPU build")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run with only the given build switches set; stdout and stderr come together."""
    unset = ("NIVMF_", "CC", "CXX", "PYTHONPATH", "MAKE", "CUDA_", "TORCH_CUDA_ARCH_LIST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_wheel(source: Path, into: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--verbose", "--wheel-dir", into)
    return run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=into, **variables)


def copy_package(into: Path) -> None:
    """Copy the files that a build reads, without csrc and without anything built."""
    ignored = shutil.ignore_patterns("_C_*", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "nivmf_fast", into / "nivmf_fast", ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, into)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy whose C++ is empty, so that it builds in a second."""
    tree = tmp_path / "tree"
    copy_package(tree)
    (tree / "csrc").mkdir()
    for name in ("registration_cpu.cpp", "registration_cuda.cpp", "kernel.cu"):
        (tree / "csrc" / name).touch()
    return tree


@pytest.fixture
def install(tmp_path: Path) -> Callable[[Path], Path]:
    """Installs a wheel into a new environment that sees this one's torch; returns its python."""

    def install(wheel: Path) -> Path:
        home = tmp_path / "venv"
        python = home / "bin" / "python"
        run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (home / "lib" / name / "site-packages" / "torch_of_the_tests.pth").write_text(SITE_PACKAGES)
        options = ("--no-deps", "--no-index", "--ignore-installed")
        done = run(python, "-m", "pip", "install", *options, wheel, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        return python

    return install


CALL_AN_OP = """
import torch, nivmf_fast
from nivmf_fast import _backends
backend = nivmf_fast.which_backend("vmf_log_normalizer", "cpu")
k = torch.tensor([0.0, 10.0], dtype=torch.float64)
g = nivmf_fast.vmf_log_normalizer(k, 8)
print(nivmf_fast.__file__, backend, float(g[1] - g[0]))
"""


@needs_setuptools
@needs_compiler
def test_a_wheel_from_the_sdist_runs_its_kernels_elsewhere(
    tmp_path: Path, install: Callable[[Path], Path]
) -> None:
    source = tmp_path / "source"
    copy_package(source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source)
    assert done.returncode == 0, done.stdout

    (sdist,) = tmp_path.glob("*.tar.gz")
    done = build_wheel(sdist, tmp_path, NIVMF_CUDA="0", NIVMF_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"nivmf_fast-{metadata.version('nivmf-fast')}-py3-none-{platform}.whl"
    content = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"nivmf_fast/{name}" for name in ("_C_cpu.so", "_build_info.json", "py.typed")
    } < content
    assert {name.partition("/")[0].partition("-")[0] for name in content} == {"nivmf_fast"}

    python = install(wheel)
    done = run(python, "-c", CALL_AN_OP, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    file, backend, difference = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert backend == "cpu"
    assert float(difference) == pytest.approx(math.log(5**3 / (6 * 1758.3807166108532)))  # I_3(10)


@needs_setuptools
def test_without_a_compiler_the_package_installs_pure_with_a_warning(
    tree: Path, tmp_path: Path, install: Callable[[Path], Path]
) -> None:
    done = build_wheel(tree, tmp_path, CC=NOWHERE, CXX=NOWHERE)
    assert done.returncode == 0, done.stdout
    assert "WARNING: _C_cpu is left out: there is no C++ compiler" in done.stdout
    assert "sudo apt install g++" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")

    python = install(wheel)
    done = run(python, "-c", CALL_AN_OP, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split()[1] == "reference"
    done = run(python, "-m", "nivmf_fast", cwd=tmp_path)
    assert "there is no C++ compiler" in done.stdout


@needs_setuptools
@needs_compiler
@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_source_that_does_not_compile_is_an_error_only_where_kernels_are_required(
    tree: Path, tmp_path: Path, strict: str
) -> None:
    (tree / "csrc" / "registration_cpu.cpp").write_text("#error broken on purpose\n")
    done = build_wheel(tree, tmp_path, NIVMF_CUDA="0", NIVMF_REQUIRE_EXT=strict)
    assert "broken on purpose" in done.stdout
    if strict == "1":
        assert done.returncode != 0
        assert "_C_cpu is required, but the build failed" in done.stdout
    else:
        assert done.returncode == 0
        assert "WARNING: _C_cpu is left out: the build failed" in done.stdout


@needs_setuptools
@needs_compiler
@needs_cuda_torch
@pytest.mark.parametrize(
    "switches",
    [{"NIVMF_REQUIRE_EXT": "1"}, {"NIVMF_CUDA": "1"}],
    ids=lambda switches: next(iter(switches)),
)
def test_a_failed_cuda_build_is_an_error_where_it_is_required(
    tree: Path, tmp_path: Path, switches: dict[str, str]
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'broken on purpose' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    done = build_wheel(tree, tmp_path, CUDA_HOME=str(tmp_path / "cuda"), **switches)
    assert done.returncode != 0
    assert "_C_cuda is required, but the build failed" in done.stdout
    assert "broken on purpose" in done.stdout


@needs_setuptools
@pytest.mark.parametrize(
    ("version", "switches", "message"),
    [
        (
            "2.9.1",
            {"NIVMF_REQUIRE_EXT": "1"},
            "_C_cpu is required, but torch 2.9.1 is older than 2.10",
        ),
        (
            "2.13.0+cpu",
            {"NIVMF_CUDA": "1"},
            "_C_cuda is required, but torch 2.13.0+cpu is a build without CUDA",
        ),
    ],
    ids=["too old", "without CUDA"],
)
def test_a_torch_that_cannot_do_it_is_named(
    tree: Path, tmp_path: Path, version: str, switches: dict[str, str], message: str
) -> None:
    located = tmp_path / "located" / "torch"
    located.mkdir(parents=True)
    (located / "__init__.py").write_text("raise ImportError('the build only locates torch')")
    (located / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    done = build_wheel(tree, tmp_path, PYTHONPATH=str(located.parent), **switches)
    assert done.returncode != 0
    assert message in done.stdout


@needs_setuptools
@needs_compiler
def test_kernels_of_an_earlier_build_do_not_outlive_a_switch(tree: Path, tmp_path: Path) -> None:
    for stale in ("_C_cuda.so", "_C_cpu.so"):
        (tree / "nivmf_fast" / stale).touch()
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, NIVMF_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert [file.name for file in (tree / "nivmf_fast").glob("_C_*")] == ["_C_cpu.so"]
    assert (tree / "nivmf_fast" / "_C_cpu.so").stat().st_size
    info = json.loads((tree / "nivmf_fast" / "_build_info.json").read_text())
    assert info["built"] == ["_C_cpu"]
    assert info["torch"] == torch.__version__
    assert info["off"] == {"_C_cuda": "it was switched off by NIVMF_CUDA=0"}
    assert "NIVMF_CUDA=1" in info["remedy"]["_C_cuda"]


@needs_setuptools
@needs_compiler
def test_an_isolated_build_finds_the_torch_that_is_installed(tree: Path, tmp_path: Path) -> None:
    # As pip does it: site-packages is hidden, the build requirements are on PYTHONPATH.
    requirements = tmp_path / "isolated"
    requirements.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (requirements / name).symlink_to(Path(SITE_PACKAGES, name))
    command = (sys.executable, "-S", "setup.py", "build_ext", "--inplace")
    switches = {"NIVMF_CUDA": "0", "NIVMF_REQUIRE_EXT": "1"}
    done = run(*command, cwd=tree, PYTHONPATH=str(requirements), **switches)
    assert done.returncode == 0, done.stdout
    assert f"for torch {torch.__version__} in {SITE_PACKAGES}" in done.stdout


@needs_setuptools
@pytest.mark.parametrize("switch", ["NIVMF_CUDA", "NIVMF_REQUIRE_EXT"])
def test_an_unknown_value_of_a_build_switch_is_refused(
    tree: Path, tmp_path: Path, switch: str
) -> None:
    done = build_wheel(tree, tmp_path, **{switch: "yes"})
    assert done.returncode != 0
    assert f"{switch}='yes'; allowed are" in done.stdout


@pytest.mark.parametrize("architecture", ["8.0", "9.0"])
def test_no_cuda_kernel_spills_registers(architecture: str) -> None:
    report = ROOT / "build" / "ptxas.txt"
    if "_C_cuda" not in INFO.get("built", []):
        pytest.skip(f"_C_cuda was not built: {INFO.get('off', {}).get('_C_cuda', 'no build here')}")
    if architecture not in INFO["cuda_architectures"]:
        pytest.skip(f"kernels were built for {INFO['cuda_architectures']} only")
    if not report.exists():
        pytest.skip(f"{report} is missing: the kernels were built elsewhere")
    target = f"for 'sm_{architecture.replace('.', '')}'"
    kernels = report.read_text().split("Compiling entry function")[1:]
    kernels = [kernel for kernel in kernels if target in kernel]
    assert kernels
    spills = re.compile(r"[1-9]\d* bytes spill")
    assert [kernel.split()[0] for kernel in kernels if spills.search(kernel)] == []


def test_the_module_run_reports_every_version_and_backend() -> None:
    done = run(sys.executable, "-m", "nivmf_fast", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    facts, backends = done.stdout.split("\n\n")
    assert {line.split()[0] for line in facts.splitlines()} == {
        *("nivmf_fast", "python", "torch", "triton", "cuda", "compiler", "nvcc"),
        *("platform", "cpu", "gpu"),
    }
    assert f"{torch.__version__}, kernels built for {INFO.get('torch', 'no torch')}" in facts
    for name, state in nivmf_fast.backends().items():
        built, usable = ("yes" if fact else "no" for fact in (state.built, state.usable))
        assert re.search(rf"^{name} +{built} +{usable}\b", backends, re.MULTILINE)
        assert state.usable or (state.reason in backends and state.remedy in backends)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs make, with nothing set up, on an interpreter that is this shell script."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make(script: str) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return run("make", f"PYTHON={python}", cwd=tmp_path, PATH="/usr/bin:/bin")

    return make


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('case "$2" in *version_info*) exit 1;; esac', "is older than 3.10; try: make PYTHON="),
        ('case "$2" in *ensurepip*) exit 1;; esac', "try: sudo apt install python3-venv"),
    ],
    ids=["old python", "no venv"],
)
def test_make_says_in_a_line_what_the_machine_lacks(
    make: Callable[[str], subprocess.CompletedProcess[str]], script: str, message: str
) -> None:
    done = make(script)
    assert done.returncode != 0
    assert message in done.stdout


def test_constraints_pin_every_dependency_of_every_extra() -> None:
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    required = metadata.requires("nivmf-fast") or []
    names = {re.match(r"[\w-]+", line)[0] for line in required if "faiss-gpu" not in line}  # type: ignore[index]
    assert {re.sub("[-_.]+", "-", name).lower() for name in names} <= set(pinned)
