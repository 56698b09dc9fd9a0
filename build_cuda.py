"""Runs nvcc for setup.py, benchmarks/static and the tests: which one, for what, with what flags.

`python build_cuda.py` says what a build would do.

torch's own helper refuses CPU builds of torch, and builds with another CUDA. Neither matters here:
nvcc compiles the kernels and the C API, which include nothing of torch, and links the CUDA runtime
in. Only the binding includes torch's stable headers, and the host's compiler compiles it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent
SOURCE = "csrc/cuda/launch.cu"
# No contraction, on the host or on the device: a fused multiply-add is written as one, so that all
# instruction sets agree.
HOST_FLAGS = ("-ffp-contract=off", "-fvisibility=hidden", "-Wall")
FLAGS = ("-std=c++20", "-O3", "--fmad=false", f"-Xcompiler={','.join(HOST_FLAGS)},-fPIC")
ARCHITECTURES = "9.0;10.0;12.0"
"""Compute capabilities that are compiled for unless TORCH_CUDA_ARCH_LIST names others.

What is compiled for 10.0 runs on 10.3 too; for 10.0a, the same code, it would not.
"""

_OLDEST_NVCC = (12, 8)  # it knows fences of shared memory alone (csrc/cuda/team.h)
_LOCAL = Path("/usr/local")  # where CUDA's installers put toolkits
_OLDEST = 90  # clusters
_ENTRY = re.compile(r"(?P<major>\d+)\.(?P<minor>\d)(?P<feature>[af]?)(?P<ptx>\+PTX)?")


class Unavailable(RuntimeError):
    """The kernels can't be compiled here; the message is a sentence."""


@dataclass(frozen=True)
class Nvcc:
    """A compiler, and where what it links against is."""

    path: str
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]

    def compile(self, target: Path, generate: Sequence[str], *flags: str) -> str:
        """Compile the kernels, with CXX beside nvcc where it is set; returns what nvcc says.

        Args:
            target: the file to write.
            generate: the options of :func:`generate`.
            flags: what to make: ``-c``, ``-cubin`` or ``-shared``, and other options of nvcc.

        Raises:
            subprocess.CalledProcessError: nvcc refuses; what it says is in ``stderr``.
        """
        target = target.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        host = shlex.split(os.environ.get("CXX", ""))[:1]
        beside = [f"-ccbin={compiler}" for compiler in host]
        command = [self.path, *FLAGS, *beside, *generate, *flags, SOURCE, "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return done.stdout + done.stderr

    def kernels(self, generate: Sequence[str]) -> Path:
        """The kernels as an object file in build/cuda, compiled where it would be another one.

        So the extension, benchmarks/static and the tests share what takes longest to compile.

        Raises:
            subprocess.CalledProcessError: as ``compile``.
        """
        sources = [ROOT / SOURCE, Path(__file__), *sorted((ROOT / "csrc").rglob("*.h"))]
        of = [_said(self.path, "--version"), os.environ.get("CXX"), *generate]
        whole = hashlib.sha256(repr(of).encode() + b"".join(s.read_bytes() for s in sources))
        target = ROOT / "build" / "cuda" / f"{whole.hexdigest()[:16]}.o"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}.o")
            # Devices side by side, in as many threads as there are cores.
            print(self.compile(unfinished, generate, "-c", "--threads=0"), end="")
            unfinished.replace(target)
            for old in target.parent.glob(f"{'?' * 16}.o"):
                if old != target:
                    old.unlink()
        return target


def toolchain() -> tuple[Nvcc, list[str]]:
    """The compiler, and its options for the devices that are wanted.

    Raises:
        Unavailable: the kernels are not wanted, or can't be compiled.
    """
    if os.environ.get("PROXYTUNE_SKIP_EXT") == "1":
        raise Unavailable("PROXYTUNE_SKIP_EXT=1")
    if os.environ.get("PROXYTUNE_SKIP_CUDA_BUILD") == "1":
        raise Unavailable("PROXYTUNE_SKIP_CUDA_BUILD=1")
    if os.environ.get("PROXYTUNE_SANITIZE") == "1":
        raise Unavailable("PROXYTUNE_SANITIZE=1 is for the CPU's kernels")
    nvcc = find_nvcc()
    return nvcc, generate(nvcc)


def find_nvcc() -> Nvcc:
    """The compiler under CUDA_HOME or CUDA_PATH; without these the first of :func:`_installed`.

    Raises:
        Unavailable: there is none, or it is too old.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    where = f"in {home}/bin" if home else (
        f"on the PATH, in {_LOCAL}/cuda*/bin or in the package nvidia-cuda-nvcc"
    )  # fmt: skip
    old = []
    for name in [f"{home}/bin/nvcc"] if home else _installed():
        if (path := shutil.which(name)) is None:
            continue
        release = re.search(r"release (\d+)\.(\d+)", _said(path, "--version"))
        if release is not None and (int(release[1]), int(release[2])) >= _OLDEST_NVCC:
            return _described(path)
        found = "of an unknown version" if release is None else release[0]
        wanted = ".".join(map(str, _OLDEST_NVCC))
        old.append(f"{path} is {found}, {wanted} or later is needed")
    raise Unavailable("; ".join(old) or f"there is no nvcc {where}")


def _installed() -> Iterator[str]:
    """Where nvcc may be, the likeliest first: the PATH, NVIDIA's installers, NVIDIA's wheels.

    Of toolkits side by side only those of torch's major version, the newest first: what they build
    then runs on any driver that torch runs on.
    """
    yield "nvcc"
    yield f"{_LOCAL}/cuda/bin/nvcc"
    torch = find_spec("torch")  # not imported: that takes seconds
    version = Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    text = version.read_text() if version and version.exists() else ""
    major = re.search(r"^cuda\b.*= '(\d+)", text, re.MULTILINE)

    def newest(paths: Iterator[Path], place: int) -> Iterator[str]:
        numbers = {path: re.findall(r"\d+", path.parts[place]) for path in paths}
        for path in sorted(numbers, key=lambda path: [int(n) for n in numbers[path]], reverse=True):
            if major is None or numbers[path][:1] in ([], [major[1]]):
                yield str(path)

    yield from newest(_LOCAL.glob("cuda-*/bin/nvcc"), -3)
    nvidia = find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        yield from newest(Path(folder).glob("cu*/bin/nvcc"), -3)


def _described(path: str) -> Nvcc:
    # It may be a link or a script: what it would do tells where its toolkit is.
    plan = _said(path, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)

    def folders(name: str, option: str) -> tuple[str, ...]:
        lines = re.findall(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
        return tuple(re.findall(rf'"{option}([^"]+)"', " ".join(lines)))

    return Nvcc(path, folders("INCLUDES", "-I"), folders("LIBRARIES", "-L"))


def generate(nvcc: Nvcc) -> list[str]:
    """nvcc's options for the devices of TORCH_CUDA_ARCH_LIST, else of :data:`ARCHITECTURES`.

    Entries are separated by semicolons or spaces: ``9.0``, ``9.0a``, ``9.0+PTX``. Those below 9.0
    are left out, and of the default those that this nvcc does not know: standard error says so.

    Raises:
        Unavailable: none is left.
        ValueError: an entry that is none.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = _said(nvcc.path, "--list-gpu-code").split()
    options = []
    for text in re.split(r"[;\s]+", (listed or ARCHITECTURES).strip()):
        entry = _ENTRY.fullmatch(text)
        if entry is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must have entries like 9.0, 9.0a or 9.0+PTX, got {text!r}"
            )
        number = int(entry["major"] + entry["minor"])
        if number < _OLDEST or (not listed and f"sm_{number}" not in known):
            why = "clusters need 9.0" if number < _OLDEST else f"{nvcc.path} does not know it"
            print(f"CUDA C++ kernels: not compiled for {text}: {why}", file=sys.stderr)
            continue
        name = f"{number}{entry['feature']}"
        options.append(device(name))
        if entry["ptx"]:
            options.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    if not options:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST={listed} names no device from 9.0")
    return options


def device(name: str) -> str:
    """nvcc's option for the devices of a compute capability, as ``90``."""
    return f"-gencode=arch=compute_{name},code=sm_{name}"


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    try:
        _, _devices = toolchain()
        print("CUDA C++ kernels: built for", ", ".join(d.split("code=")[-1] for d in _devices))
    except Unavailable as error:
        print(f"CUDA C++ kernels: not built: {error}")
