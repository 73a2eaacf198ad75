"""How fast a machine is: measured here (`measure.py`), or from a data sheet times an assumed efficiency."""

from __future__ import annotations

from dataclasses import dataclass

from partialfc.plan.request import PlanRequest

GIB = 1 << 30

# What part of its data sheet a device reaches. Assumed, not measured.
BACKBONE_EFFICIENCY = 0.35
HEAD_EFFICIENCY = 0.5
MEMORY_EFFICIENCY = 0.7
LINK_EFFICIENCY = 0.7
DATA_SHEET = (
    f"data sheet times an assumed efficiency (backbone {BACKBONE_EFFICIENCY:g}, head {HEAD_EFFICIENCY:g}, memory "
    f"{MEMORY_EFFICIENCY:g}, links {LINK_EFFICIENCY:g}); not measured"
)


@dataclass(frozen=True)
class MachineRates:
    """What a process reaches in training steps.

    Attributes:
        name: of the device, and `origin` of the figures.
        memory_bytes: of the device.
        backbone_flops: operations a second of the backbone's passes.
        backbone_seconds: of a step whatever its batch, without the weights' update where that is counted in bytes.
        head_flops: operations a second of the head's products, its exponentials included.
        head_row_bytes: bytes a second of the sampled rows that the head reads and writes.
        head_seconds: of the head's step whatever its size.
        memory_rate: bytes a second, for the update of the backbone's weights; 0 where backbone_seconds has it.
        host_rate: bytes a second between host and device.
        node_rate, node_latency: bytes a second and seconds of a collective's step inside a machine.
        network_rate, network_latency: the same between machines, for one process of them.
        decode_rate: images a second that one reading process decodes.
    """

    name: str
    origin: str
    memory_bytes: int
    backbone_flops: float
    backbone_seconds: float
    head_flops: float
    head_row_bytes: float
    head_seconds: float
    memory_rate: float
    host_rate: float
    node_rate: float
    node_latency: float
    network_rate: float
    network_latency: float
    decode_rate: float


@dataclass(frozen=True)
class DataSheet:
    """Published figures of a GPU: dense matrix rates, memory, and rates in one direction.

    Attributes:
        name: and form factor.
        gib: of device memory.
        half, single: TFLOP/s of 16 bits, and of float32 without TF32.
        memory: GB/s of the device memory.
        host: GB/s of the host's bus.
        node: GB/s of NVLink for one GPU.
        network: GB/s for one GPU, of the network adapters that such a machine usually has.
    """

    name: str
    gib: float
    half: float
    single: float
    memory: float
    host: float
    node: float
    network: float


DATA_SHEETS = {
    "v100": DataSheet("V100 SXM2 32 GB", 32, 125, 15.7, 900, 16, 150, 6.25),
    "a100": DataSheet("A100 SXM 80 GB", 80, 312, 19.5, 2039, 32, 300, 25),
    "h100": DataSheet("H100 SXM 80 GB", 80, 989, 67, 3350, 64, 450, 50),
    "h200": DataSheet("H200 SXM 141 GB", 141, 989, 67, 4800, 64, 450, 50),
}
_LAUNCH_SECONDS = 0.005  # of a step's kernel launches and host work, assumed
_DECODE_RATE = 5000.0  # 112 x 112 JPEGs of one core, Pillow, loader included, assumed


def preset(request: PlanRequest, precision: str) -> MachineRates:
    """The rates of a GPU that is not here."""
    sheet = DATA_SHEETS[request.device]
    backbone = sheet.single if precision == "float32" else sheet.half
    head = sheet.single if request.head_operand_dtype == "float32" else sheet.half
    return MachineRates(
        name=sheet.name,
        origin=DATA_SHEET,
        memory_bytes=int(sheet.gib * GIB),
        backbone_flops=backbone * 1e12 * BACKBONE_EFFICIENCY,
        backbone_seconds=_LAUNCH_SECONDS,
        head_flops=head * 1e12 * HEAD_EFFICIENCY,
        head_row_bytes=sheet.memory * 1e9 * MEMORY_EFFICIENCY,
        head_seconds=_LAUNCH_SECONDS,
        memory_rate=sheet.memory * 1e9 * MEMORY_EFFICIENCY,
        host_rate=sheet.host * 1e9 * LINK_EFFICIENCY,
        node_rate=sheet.node * 1e9 * LINK_EFFICIENCY,
        node_latency=10e-6,
        network_rate=sheet.network * 1e9 * LINK_EFFICIENCY,
        network_latency=20e-6,
        decode_rate=_DECODE_RATE,
    )
