"""How fast a GPU is, from its data sheet times an assumed efficiency; `measure.py` measures this machine instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GIB = 1 << 30

# The part of its data sheet that a device reaches; assumed, not measured.
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
        name: of the device.
        origin: of the figures.
        backbone_flops: operations per second of the backbone's passes.
        head_flops: operations per second of the head's products, its exponentials included.
        memory_rate: bytes per second of rows, weights and states; None if the rates above cover them.
        host_rate: bytes per second between host and device.
        overhead: seconds of backbone and of head that do not depend on their size.
        node_rate, node_latency: bytes per second and seconds of a collective's step inside a machine.
        network_rate, network_latency: the same between machines, for one of their processes.
    """

    name: str
    origin: str
    backbone_flops: float
    head_flops: float
    memory_rate: float | None
    host_rate: float
    overhead: float
    node_rate: float
    node_latency: float
    network_rate: float
    network_latency: float


class DataSheet(NamedTuple):
    """Published figures of a GPU: GiB of memory, dense TFLOP/s, and GB/s in one direction.

    `half` is for 16-bit numbers, `single` for float32 without TF32; `node` is NVLink, and `network` one GPU's share of
    the adapters that machines with it usually have.
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
_LAUNCH_SECONDS = 0.005  # kernel launches and host work of a step, assumed


def preset(device: str, precision: str, operand_dtype: str) -> MachineRates:
    """The rates of a GPU, from its data sheet; the precision is the backbone's, the dtype of operands the head's."""
    sheet = DATA_SHEETS[device]
    backbone = sheet.single if precision == "float32" else sheet.half
    head = sheet.single if operand_dtype == "float32" else sheet.half
    return MachineRates(
        name=sheet.name,
        origin=DATA_SHEET,
        backbone_flops=backbone * 1e12 * BACKBONE_EFFICIENCY,
        head_flops=head * 1e12 * HEAD_EFFICIENCY,
        memory_rate=sheet.memory * 1e9 * MEMORY_EFFICIENCY,
        host_rate=sheet.host * 1e9 * LINK_EFFICIENCY,
        overhead=_LAUNCH_SECONDS,
        node_rate=sheet.node * 1e9 * LINK_EFFICIENCY,
        node_latency=10e-6,
        network_rate=sheet.network * 1e9 * LINK_EFFICIENCY,
        network_latency=20e-6,
    )
