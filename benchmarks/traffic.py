"""What an algorithm moves through a GPU's memory, and the least time that can take: the model.

An :class:`Algorithm` is a list of operations, an operation a list of kernels, a kernel the bytes it
reads and writes per vocabulary entry of one row, each with its reason. :func:`estimate` turns one
into microseconds on a :class:`Gpu`. Nothing here is measured. docs/roofline.md derives it.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a logit, by the name of its dtype."""

SM_BYTES_PER_CLOCK = 64
"""Bytes that one SM takes from L2 in a clock at most; an assumption."""


@dataclass(frozen=True)
class Gpu:
    """What the model needs of a GPU, as published.

    Attributes:
        name: as on the command line.
        compute_capability: such as ``"9.0"``.
        sms: streaming multiprocessors.
        bandwidth: of device memory, TB/s (10^12 bytes), from the maker's data sheet.
        l2_mib: L2 cache, MiB.
        clock: highest clock of the SMs, GHz.
    """

    name: str
    compute_capability: str
    sms: int
    bandwidth: float
    l2_mib: float
    clock: float

    def sm_bytes_per_us(self, blocks: int) -> float:
        """Bytes a microsecond that ``blocks`` blocks can draw, each on an SM of its own."""
        return min(blocks, self.sms) * SM_BYTES_PER_CLOCK * self.clock * 1e3


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "9.0", 132, 3.35, 50, 1.98),  # SXM5, 80 GB HBM3
        Gpu("h200", "9.0", 132, 4.8, 50, 1.98),  # SXM, 141 GB HBM3e
        Gpu("a100-80", "8.0", 108, 2.039, 40, 1.41),  # SXM4, 80 GB HBM2e
        Gpu("b200", "10.0", 148, 8.0, 126, 1.98),  # SXM, "up to 8 TB/s" HBM3e
        Gpu("l40s", "8.9", 142, 0.864, 96, 2.52),  # 48 GB GDDR6
        Gpu("rtx-4090", "8.9", 128, 1.008, 72, 2.52),  # 24 GB GDDR6X
        Gpu("rtx-5090", "12.0", 170, 1.792, 96, 2.41),  # 32 GB GDDR7
    )
}
"""GPUs by name."""


@dataclass(frozen=True)
class Case:
    """What is asked for: ``rows`` rows of ``vocab_size`` logits of each role.

    ``filters`` and ``kind`` are names of :data:`benchmarks.op_cases.FILTERS` and
    :data:`benchmarks.logits.KINDS`; ``dtype`` one of :data:`DTYPE_BYTES`.
    """

    rows: int = 1
    vocab_size: int = 128_256
    dtype: str = "bf16"
    filters: str = "top_p"
    kind: str = "peaked"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one logit."""
        return DTYPE_BYTES[self.dtype]

    @property
    def entries(self) -> int:
        """Vocabulary entries of all rows."""
        return self.rows * self.vocab_size


@dataclass(frozen=True)
class Kernel:
    """One kernel, or ``launches`` of them that are alike.

    Attributes:
        name: of the kernel, or what it does.
        read, write: bytes per vocabulary entry and launch, each byte counted once.
        why: the reason, in words.
        launches: kernels and memory sets; each is a node of a CUDA graph.
        reread: bytes per entry and launch that it reads again itself; a cache may hold them.
        blocks: that work on a row; few of them leave most SMs idle. None: enough for all SMs.
        trips: dependent trips to memory per launch: loads that wait for what was loaded before.
    """

    name: str
    read: float
    write: float
    why: str
    launches: int = 1
    reread: float = 0.0
    blocks: int | None = None
    trips: float = 1.0

    @property
    def bytes_once(self) -> float:
        """Bytes per entry, all launches, without what a kernel reads again itself."""
        return self.launches * (self.read + self.write)

    @property
    def bytes_moved(self) -> float:
        """Bytes per entry, all launches."""
        return self.launches * (self.read + self.write + self.reread)


@dataclass(frozen=True)
class Op:
    """One operation as its caller sees it, and the kernels a GPU runs for it.

    Attributes:
        name: ATen's, without overload, where it is one of ATen's: ``count_ops`` compares.
        read, write: bytes per entry of its arguments and of its results, each counted once.
        kernels: what runs.
    """

    name: str
    read: float
    write: float
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Algorithm:
    """One way to do an operation on the logits of three roles.

    Attributes:
        name: as in tables.
        ops: in order.
        compulsory: bytes per entry that no cache saves: the operation's own inputs and outputs.
        basis: what the counts rest on.
        spread: least and most bytes per entry where data decides; None where it does not.
    """

    name: str
    ops: tuple[Op, ...]
    compulsory: float
    basis: str
    spread: tuple[float, float] | None = None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels in order."""
        return tuple(kernel for op in self.ops for kernel in op.kernels)

    @property
    def bytes_moved(self) -> float:
        """Bytes per vocabulary entry."""
        return sum(kernel.bytes_moved for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Kernels and memory sets."""
        return sum(kernel.launches for kernel in self.kernels)


@dataclass(frozen=True)
class Latency:
    """What a launch and a trip to memory take, microseconds; assumptions, not measurements.

    Attributes:
        launch: from the end of a kernel to the start of one that depends on it, in a CUDA graph.
        trip: from issuing a load to having its value reduced within a block.
    """

    launch: float = 1.0
    trip: float = 0.5


@dataclass(frozen=True)
class Estimate:
    """An algorithm's cost in one case on one GPU; times in microseconds.

    Attributes:
        bytes_per_entry, launches: as the algorithm says.
        megabytes: of all rows, 10^6 bytes.
        bytes_us: every byte from device memory, at the rate that the kernel's blocks can draw.
        cached_us: the same where L2 keeps all that it can.
        latency_us: launches and dependent trips to memory, one after the other.
    """

    bytes_per_entry: float
    launches: int
    megabytes: float
    bytes_us: float
    cached_us: float
    latency_us: float

    @property
    def floor_us(self) -> float:
        """The roofline: the larger of bytes and latency."""
        return max(self.bytes_us, self.latency_us)

    @property
    def cached_floor_us(self) -> float:
        """The same where L2 keeps all that it can: what nothing can beat with cold inputs."""
        return max(self.cached_us, self.latency_us)

    @property
    def bound(self) -> str:
        """What decides the roofline."""
        return "bytes" if self.bytes_us > self.latency_us else "latency"


def _device_bytes(algorithm: Algorithm, case: Case, gpu: Gpu) -> float:
    """Least bytes to and from device memory, whatever the replacement policy.

    Between two kernels L2 saves at most twice its size: what it holds need not be read, and what
    of it is dirty need not be written. A kernel's own second reads are taken to hit.
    """
    once = [(k.bytes_once / k.launches, k.launches) for k in algorithm.kernels if k.bytes_once]
    total = case.entries * sum(size * launches for size, launches in once)
    boundaries = sum(launches for _, launches in once) - 1
    saved = 2 * gpu.l2_mib * 2**20 * boundaries
    return max(case.entries * algorithm.compulsory, total - saved)


def estimate(algorithm: Algorithm, case: Case, gpu: Gpu, latency: Latency) -> Estimate:
    """Turn an algorithm's bytes, launches and trips into times. docs/roofline.md, Floors."""
    memory = gpu.bandwidth * 1e6  # bytes a microsecond
    bytes_us = drawn_us = latency_us = 0.0
    for kernel in algorithm.kernels:
        moved = case.entries * kernel.bytes_moved
        blocks = gpu.sms if kernel.blocks is None else case.rows * kernel.blocks
        drawn = gpu.sm_bytes_per_us(blocks)
        bytes_us += moved / min(memory, drawn)
        drawn_us += moved / drawn
        latency_us += kernel.launches * (latency.launch + kernel.trips * latency.trip)
    return Estimate(
        bytes_per_entry=algorithm.bytes_moved,
        launches=algorithm.launches,
        megabytes=case.entries * algorithm.bytes_moved / 1e6,
        bytes_us=bytes_us,
        cached_us=max(_device_bytes(algorithm, case, gpu) / memory, drawn_us),
        latency_us=latency_us,
    )
