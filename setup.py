"""Builds the kernel libraries nivmf_fast/_C_cpu.so and _C_cuda.so; the rest is in pyproject.toml.

Both use only LibTorch's stable ABI, so that a library built against one torch loads under every
later one and on any Python. They are not Python modules: they register operators when
`torch.ops.load_library` opens them. A library that cannot be built is left out with a warning, and
the package then runs on pure PyTorch. Two environment variables control this:

    NIVMF_CUDA=auto|1|0    auto (default) builds _C_cuda if nvcc and a CUDA torch are there;
                           1 makes it an error if they are not; 0 leaves it out
    NIVMF_REQUIRE_EXT=0|1  1 makes every failed build an error

nivmf_fast/_build_info.json records what was built and with which tools, and why the rest was not.
TORCH_CUDA_ARCH_LIST sets the CUDA architectures, as in torch.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
OLDEST_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
PTXAS_REPORT = ROOT / "build" / "ptxas.txt"  # registers and spills per kernel and architecture
REBUILD = (
    "pip install --no-deps --editable ."
    if (ROOT / ".git").exists()
    else "pip install --no-deps --no-cache-dir --force-reinstall nivmf-fast"
)


class Unavailable(Exception):
    """A tool or library that the build needs is missing."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def say(text: str) -> None:
    print(f"nivmf-fast: {text}", file=sys.stderr, flush=True)


def switch(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or allowed[0]
    if value not in allowed:
        raise SystemExit(f"nivmf-fast: {name}={value!r}; allowed are {', '.join(allowed)}")
    return value


class Torch:
    """The installed torch, located but not imported: only its headers and libraries are needed."""

    def __init__(self) -> None:
        self.root = self._locate()
        version = runpy.run_path(str(self.root / "version.py"))
        self.version: str = version["__version__"]
        self.cuda: str | None = version["cuda"]
        if tuple(map(int, self.version.split(".")[:2])) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            raise Unavailable(
                f"torch {self.version} is older than {oldest}",
                f"pip install 'torch>={oldest}' && {REBUILD}",
            )

    @staticmethod
    def _locate() -> Path:
        if spec := find_spec("torch"):
            return Path(spec.submodule_search_locations[0])
        # pip's build isolation hides site-packages through PYTHONPATH, which -E ignores.
        code = "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
        found = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True)
        if found.returncode:
            raise Unavailable(
                f"the build found no torch in {sys.prefix}",
                f"pip install torch && {REBUILD} --no-build-isolation",
            )
        return Path(found.stdout.strip())


class Nvcc:
    """The CUDA compiler, of CUDA_HOME, PATH, /usr/local/cuda or the pip packages next to torch."""

    def __init__(self, torch: Torch) -> None:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        candidates = [
            *(Path(home, "bin", "nvcc") for home in homes if home),
            *(Path(path) for path in [shutil.which("nvcc")] if path),
            Path("/usr/local/cuda/bin/nvcc"),
            *torch.root.parent.glob("nvidia/cu*/bin/nvcc"),
        ]
        self.path = next((str(path) for path in candidates if path.exists()), "")
        if not self.path:
            toolkit = f"cuda-toolkit[nvcc,cccl,crt,nvvm,cudart]=={torch.cuda}.*"
            raise Unavailable("nvcc was not found", f"pip install '{toolkit}' && {REBUILD}")

    def version(self) -> str:
        text = subprocess.run([self.path, "--version"], capture_output=True, text=True).stdout
        return match[1] if (match := re.search(r"V([\d.]+)", text)) else "unknown"

    def library_dirs(self) -> list[str]:
        """The folders of cudart. nvcc knows them, even as a wrapper script far from its toolkit."""
        command = [self.path, "--dryrun", "-c", "any.cu"]
        text = subprocess.run(command, capture_output=True, text=True).stderr
        found = re.findall(r'"-L([^"]+)"', text)
        # The pip packages put it in lib, although their nvcc says lib64.
        return found + [path.replace("/lib64", "/lib") for path in found]

    def compile(self, architectures: str, source: Path, target: Path) -> str:
        """Compile one file; return ptxas's report on its kernels."""
        command = [self.path, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += ["-Xptxas=-v", *gencode(architectures), "-c", str(source), "-o", str(target)]
        say(" ".join(command))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile {source}:\n{done.stdout}{done.stderr}")
        return done.stderr


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list such as 8.0;9.0+PTX."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip()):
        if not (match := re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", name)):
            raise ValueError(f"CUDA architecture {name!r}; expected e.g. 8.0 or 9.0a or 9.0+PTX")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildKernels(build_ext):
    """Builds what can be built, and records it for the library with the reasons for the rest."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # no Python ABI in it

    def build_extensions(self) -> None:
        self.info = {"built": [], "off": {}, "remedy": {}}
        package = Path(self.build_lib, "nivmf_fast")
        for stale in [*package.glob("_C_*.so"), PTXAS_REPORT]:
            stale.unlink(missing_ok=True)
        self.extensions = [ext for ext in self.extensions if self.build_or_explain(ext)]
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.info, indent=2) + "\n")

    def build_or_explain(self, ext: Extension) -> bool:
        name = ext.name.removeprefix("nivmf_fast.")
        cuda = name == "_C_cuda"
        demanded = cuda and switch("NIVMF_CUDA", ("auto", "1", "0")) == "1"
        strict = switch("NIVMF_REQUIRE_EXT", ("0", "1")) == "1"
        try:
            self.configure_cuda(ext) if cuda else self.configure_cpu(ext)
            self.build_extension(ext)
            self.info["built"].append(name)
            return True
        except Unavailable as missing:
            reason, remedy = str(missing), missing.remedy
            fatal = demanded or (strict and not cuda)
        except (BaseError, CCompilerError, OSError, RuntimeError, ValueError) as error:
            reason = f"the build failed: {error}"
            remedy = f"NIVMF_REQUIRE_EXT=1 {REBUILD} --verbose"
            fatal = demanded or strict
        if fatal:
            raise SystemExit(f"nivmf-fast: {name} is required, but {reason}\n  try: {remedy}")
        say(f"WARNING: {name} is left out: {reason}\n  to build it: {remedy}")
        self.info["off"][name], self.info["remedy"][name] = reason, remedy
        return False

    def configure_cpu(self, ext: Extension) -> None:
        torch = Torch()
        compiler = self.compiler_version()
        if not compiler:
            raise Unavailable("there is no C++ compiler", f"sudo apt install g++ && {REBUILD}")
        self.info |= {"torch": torch.version, "compiler": compiler}
        say(f"building {ext.name} for torch {torch.version} in {torch.root} with {compiler}")
        ext.include_dirs += [str(CSRC), str(torch.root / "include")]
        ext.library_dirs.append(str(torch.root / "lib"))
        target = (OLDEST_TORCH[0] << 56) | (OLDEST_TORCH[1] << 48)
        ext.define_macros.append(("TORCH_TARGET_VERSION", f"{target:#x}"))
        ext.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
        # without these no loop with a square root or a selection is vectorised
        ext.extra_compile_args += ["-fno-math-errno", "-fno-trapping-math"]
        if sys.platform == "linux":  # a missing kernel fails here, not when the library is loaded
            ext.extra_link_args.append("-Wl,--no-undefined")

    def configure_cuda(self, ext: Extension) -> None:
        if switch("NIVMF_CUDA", ("auto", "1", "0")) == "0":
            raise Unavailable("it was switched off by NIVMF_CUDA=0", f"NIVMF_CUDA=1 {REBUILD}")
        torch = Torch()
        if not (torch.root / "lib" / "libtorch_cuda.so").exists():
            raise Unavailable(
                f"torch {torch.version} is a build without CUDA",
                f"install a torch with CUDA, then {REBUILD}",
            )
        nvcc = Nvcc(torch)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
        self.info |= {"nvcc": nvcc.version(), "cuda_architectures": architectures}
        self.configure_cpu(ext)

        objects = Path(self.build_temp).resolve() / "cuda"
        objects.mkdir(parents=True, exist_ok=True)
        sources = sorted(CSRC.glob("*.cu"))
        compiled = [objects / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:
            reports = list(pool.map(partial(nvcc.compile, architectures), sources, compiled))
        PTXAS_REPORT.parent.mkdir(exist_ok=True)
        PTXAS_REPORT.write_text("".join(reports))

        ext.extra_objects += map(str, compiled)
        ext.define_macros.append(("USE_CUDA", None))  # opens the CUDA part of torch's stable header
        ext.library_dirs += nvcc.library_dirs()
        # A static cudart with hidden symbols, because torch may bring another version of it.
        ext.extra_link_args += ["-l:libcudart_static.a", "-Wl,--exclude-libs,ALL"]
        ext.extra_link_args += ["-lrt", "-lpthread", "-ldl"]

    def compiler_version(self) -> str:
        """First line of `$CXX --version`, empty without a compiler."""
        try:
            command = [self.compiler.compiler_so_cxx[0], "--version"]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (AttributeError, OSError, subprocess.CalledProcessError):
            return ""
        return text.splitlines()[0]

    def copy_extensions_to_source(self) -> None:
        for stale in Path("nivmf_fast").glob("_C_*.so"):
            stale.unlink()
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, "nivmf_fast", "_build_info.json"), "nivmf_fast")


class TagWheel(bdist_wheel):
    """py3-none-<platform> with kernel libraries in the wheel, py3-none-any without."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        self.root_is_pure = not list(Path(self.bdist_dir).glob("nivmf_fast/_C_*.so"))
        return ("py3", "none", "any" if self.root_is_pure else platform)


def kernel_library(name: str, sources: list[Path], libraries: list[str]) -> Extension:
    return Extension(
        f"nivmf_fast._C_{name}",
        sources=sorted(map(str, sources)),
        libraries=libraries,
        language="c++",
    )


os.chdir(ROOT)
setup(
    ext_modules=[
        kernel_library("cpu", list(CSRC.glob("*_cpu.cpp")), ["torch_cpu"]),
        kernel_library("cuda", [CSRC / "registration_cuda.cpp"], ["torch_cpu", "torch_cuda"]),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
)
