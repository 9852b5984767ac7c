"""Builds pyops._C with ninja. Torch is never imported: the extension uses none of its symbols.

PYOPS_CUDA        auto (default): CUDA kernels are built when nvcc is found; 1: fail without nvcc; 0: leave them out
PYOPS_CUDA_ARCHS  architectures, default "80;90a"; the lowest is also kept as PTX
PYOPS_CUDA_HOME   the CUDA toolkit, default CUDA_HOME, else the one of the nvcc on PATH
MAX_JOBS          parallel compilations, default the number of cores
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS = [*COMMON_FLAGS, "-O2"]
# No -ffast-math: g++ then links a start-up object that flushes denormals in the whole process. The warnings that are
# switched off are false ones of g++ 12's own intrinsics.
KERNEL_FLAGS = [*COMMON_FLAGS, "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
ISA_FLAGS = {
    "baseline": (16, []),
    "avx2": (32, ["-march=x86-64-v3"]),
    "avx512": (64, ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    "avx512_bf16": (64, ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"]),
}
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def stems() -> list[str]:
    """The operations: one csrc/<stem>.cpp each."""
    boundary = {"bindings", "cpu_isa"}
    return sorted(path.stem for path in (ROOT / "csrc").glob("*.cpp") if path.stem not in boundary)


def isas() -> dict[str, tuple[int, list[str]]]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ISA_FLAGS
    return {"baseline": (16, [])}


def find_nvcc() -> Path | None:
    home = os.environ.get("PYOPS_CUDA_HOME") or os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    return nvcc.resolve() if nvcc.exists() else None


def cuda_home(nvcc: Path) -> Path:
    """The toolkit's root. nvcc may be a wrapper script outside of it, so nvcc itself is asked."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for line in dry.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return nvcc.parent.parent


def cuda_wanted() -> Path | None:
    choice = os.environ.get("PYOPS_CUDA", "auto").lower()
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"setup: PYOPS_CUDA must be auto, 1 or 0, got {choice}")
    if choice == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and choice == "1":
        raise SystemExit("setup: PYOPS_CUDA=1 needs nvcc; put it on PATH or set CUDA_HOME")
    if nvcc is None:
        print("pyops: nvcc was not found, CUDA kernels are left out (PYOPS_CUDA=1 makes this an error)")
    return nvcc


def cuda_archs() -> list[str]:
    return os.environ.get("PYOPS_CUDA_ARCHS", "80;90a").replace(",", ";").split(";")


def gencode(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    plain = sorted((a for a in archs if a.isdigit()), key=int)
    if plain:
        flags.append(f"-gencode=arch=compute_{plain[0]},code=compute_{plain[0]}")
    return flags


def write_ninja(build_dir: Path, output: Path) -> None:
    """build.ninja for pyops._C: boundary, CPU kernels once per instruction set, CUDA kernels once."""
    import pybind11
    from ninja.ninja_syntax import Writer

    nvcc = cuda_wanted()
    cxx = os.environ.get("CXX", "g++")
    if shutil.which("ccache") and "ccache" not in cxx:
        cxx = f"ccache {cxx}"
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    defines = []
    if nvcc:
        includes.append(f"-I{cuda_home(nvcc) / 'include'}")
        defines = ["-DPYOPS_WITH_CUDA", f"'-DPYOPS_CUDA_ARCHS=\"{';'.join(cuda_archs())}\"'"]

    with (build_dir / "build.ninja").open("w") as file:
        ninja = Writer(file, width=160)
        ninja.variable("builddir", str(build_dir))
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        if nvcc:
            ninja.rule("nvcc", f"{nvcc} -MD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{os.environ.get('CXX', 'g++')} -shared -fopenmp -s -o $out $in $libs")

        objects = []

        def compile(rule: str, source: str, name: str, flags: list[str]) -> None:
            objects.append(str(build_dir / f"{name}.o"))
            ninja.build(objects[-1], rule, str(ROOT / source), variables={"flags": " ".join(flags)})

        # The slowest objects first: ninja starts them in this order.
        for source in sorted(path.stem for path in (ROOT / "kernels/cuda").glob("*.cu")) if nvcc else []:
            flags = [*NVCC_FLAGS, *gencode(cuda_archs())]
            compile("nvcc", f"kernels/cuda/{source}.cu", f"cuda_{source}", flags)
        for stem in stems():
            for isa, (width, isa_flags) in isas().items():
                flags = [*KERNEL_FLAGS, *isa_flags, f"-DPYOPS_ISA={isa}", f"-DPYOPS_VECTOR_BYTES={width}"]
                compile("cxx", f"kernels/cpu/{stem}.cpp", f"cpu_{stem}_{isa}", flags)
        for source in ["bindings", "cpu_isa", *stems()]:
            compile("cxx", f"csrc/{source}.cpp", f"csrc_{source}", [*CXX_FLAGS, *includes, *defines])

        libs = ""
        if nvcc:
            home = cuda_home(nvcc)
            folders = [folder for folder in ("lib64", "lib") if (home / folder / "libcudart_static.a").exists()]
            libs = f"-L{home / (folders or ['lib64'])[0]} -lcudart_static -ldl -lrt -lpthread"
        ninja.build(str(output), "link", objects, variables={"libs": libs})
        ninja.default(str(output))


class NinjaBuild(build_ext):
    """Compiles through ninja, so that a source edit rebuilds only what it touches."""

    def build_extension(self, ext: Extension) -> None:
        from ninja import BIN_DIR

        build_dir = ROOT / "build" / sys.implementation.cache_tag
        build_dir.mkdir(parents=True, exist_ok=True)
        library = build_dir / "_C.so"
        write_ninja(build_dir, library)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([Path(BIN_DIR, "ninja"), "-C", build_dir, "-j", jobs, "--quiet"], check=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that runs the old library keeps it.
        fresh = output.with_suffix(".new")
        shutil.copy2(library, fresh)
        fresh.replace(output)


class CompleteSdist(sdist):
    """Refuses an sdist without the kernel sources."""

    def make_release_tree(self, base_dir, files):
        sources = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
        missing = [name for name in (str(path.relative_to(ROOT)) for path in sources) if name not in files]
        if missing:
            raise SystemExit(f"setup: MANIFEST.in leaves out {', '.join(missing)}")
        super().make_release_tree(base_dir, files)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("pyops._C", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "sdist": CompleteSdist},
    )
