"""Builds the two native modules; everything else is in pyproject.toml.

fastsharp._cpu    with the C++ compiler of the interpreter, or $CXX. Without one the package installs and runs on the reference.
fastsharp._cuda   with nvcc, when found. Neither a GPU nor torch is needed at build time.

FASTSHARP_CUDA=0|1         never | always: then a missing nvcc or a failed build is an error
FASTSHARP_CUDA_ARCHS=80;90 instead of the default targets 80;90;100; PTX of the last one is always included
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HEADERS = sorted(glob("csrc/include/**/*.hpp", recursive=True) + glob("csrc/*/*.hpp") + glob("csrc/*/*.inl") + glob("csrc/*/*.cuh"))
CPU_SOURCES = ["csrc/bindings/cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
CUDA_SOURCES = ["csrc/bindings/cuda.cpp", *sorted(glob("csrc/cuda/*.cu"))]
WISH = os.environ.get("FASTSHARP_CUDA", "auto")
TARGETS = ("80", "90", "100")


class BuildError(Exception):
    """A native module could not be built; the text says why."""


def say(text: str) -> None:
    print(f"fastsharp: {text}", file=sys.stderr, flush=True)


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_targets(nvcc: str) -> list[str]:
    """The compute capabilities to compile for: what was asked for, else our targets as far as this nvcc knows them."""
    asked = os.environ.get("FASTSHARP_CUDA_ARCHS")
    if asked:
        return [a.strip().removeprefix("sm_") for a in asked.replace(",", ";").split(";") if a.strip()]
    known = {a.removeprefix("sm_") for a in output_of(nvcc, "--list-gpu-code").split()}
    targets = [a for a in TARGETS if a in known]
    if not targets:
        raise BuildError(f"nvcc knows {', '.join(sorted(known))}, none of our targets {TARGETS}; set FASTSHARP_CUDA_ARCHS")
    return targets


def stub(name: str) -> str:
    """The interface that a module is built for, by its stub: fastsharp/ops/_registry.py compares it with the stub beside the module."""
    return f"-DFASTSHARP_STUB={zlib.crc32((ROOT / f'fastsharp/_{name}.pyi').read_text(encoding='utf-8').encode())}U"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if Path(p).exists()), None)


class Native(build_ext):
    """Writes one ninja file per module: parallel, incremental, and the same commands whatever setuptools thinks of .cu files."""

    cuda_status = "not tried"

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        try:
            status = self.cuda_status.replace('"', "'").replace("$", "")
            self.ninja(ext, {"csrc/bindings/cpu.cpp": [f'-DFASTSHARP_CUDA_STATUS="{status}"', stub("cpu")]}, {})
        except BuildError as e:
            self.remove_stale(ext)
            say(f"_cpu was NOT built, the reference path is used instead (slower by an order of magnitude): {e}")

    def build_cuda(self, ext: Extension) -> None:
        try:
            if WISH == "0":
                self.cuda_status = "switched off by FASTSHARP_CUDA=0"
                self.remove_stale(ext)
                return
            nvcc = find_nvcc()
            if nvcc is None:
                raise BuildError("no nvcc found on PATH or under CUDA_HOME")
            targets = cuda_targets(nvcc)
            code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
            code.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
            self.ninja(ext, {"csrc/bindings/cuda.cpp": [stub("cuda")]}, {"nvcc": nvcc, "code": " ".join(code)})
            version = output_of(nvcc, "--version").split("release ")[-1].split(",")[0]
            self.cuda_status = f"built by nvcc {version} for sm_{', sm_'.join(targets)} and PTX"
        except (BuildError, OSError, subprocess.CalledProcessError) as e:
            self.cuda_status = f"not built: {str(e).splitlines()[0]}"
            self.remove_stale(ext)
            if WISH == "1":
                raise RuntimeError(f"FASTSHARP_CUDA=1, but _cuda was not built: {e}") from e
            say(f"_cuda was NOT built: {e}")
        finally:
            say(f"_cuda {self.cuda_status}")

    def remove_stale(self, ext: Extension) -> None:
        """An earlier build must not pass for this one."""
        for path in (Path(self.get_ext_fullpath(ext.name)), ROOT / self.get_ext_filename(ext.name)):
            path.unlink(missing_ok=True)

    def ninja(self, ext: Extension, defines: dict[str, list[str]], cuda: dict[str, str]) -> None:
        """Compile ext.sources and link them; `defines` are further flags per source."""
        import ninja
        import pybind11

        cxx = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
        if shutil.which(shlex.split(cxx)[0]) is None:
            cxx = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")
        if not cxx:
            raise BuildError("no C++ compiler found; set CXX")
        # not build_temp, which an editable install throws away: objects are reused, and the register report stays
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}" / ext.name.rsplit(".", 1)[-1]
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc/include", ROOT / "csrc/cuda", Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
        flags = ["-O3", "-std=c++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC", "-fvisibility=hidden"]
        if sys.platform == "darwin":
            link, libs = f"{cxx} -shared -undefined dynamic_lookup", ""
        elif cuda:
            link, libs = f"{cuda['nvcc']} -shared -cudart static", ""
        else:
            link, libs = f"{cxx} -shared", "-ldl -pthread"
        common = " ".join(f"-I{shlex.quote(str(i))}" for i in includes)
        nvcc_flags = "-O3 -std=c++17 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
        ptxas = "$out.ptxas.txt"  # registers and spills of every kernel and target, kept beside the object
        lines = [
            f"cflags = {shlex.join(flags)} {common}",
            "rule cxx",
            f"  command = {cxx} $cflags $define -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {cuda.get('nvcc', '')} {nvcc_flags} {cuda.get('code', '')} {common} -MD -MF $out.d -c $in -o $out"
            f" > {ptxas} 2>&1 || (cat {ptxas}; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {link} $in {libs} -o $out",
        ]
        objects = []
        for source in ext.sources:
            objects.append(source.replace("/", "_") + ".o")
            lines.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'cxx'} {ninja_path(ROOT / source)}")
            if source in defines:
                lines.append(f"  define = {shlex.join(defines[source])}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        run = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], capture_output=True, text=True)
        print(run.stdout, flush=True)
        if run.returncode != 0:
            raise BuildError(f"the compiler failed in {folder}\n{run.stdout}{run.stderr}")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[  # _cuda first: _cpu records what became of it, for fastsharp.info()
        Extension("fastsharp._cuda", CUDA_SOURCES, depends=HEADERS, optional=WISH != "1"),
        Extension("fastsharp._cpu", CPU_SOURCES, depends=HEADERS, optional=True),
    ],
    cmdclass={"build_ext": Native},
)
