"""What the compiler says of the head's GPU kernels: registers, spills, shared memory. No GPU is needed.

python benchmarks/kernel_statics.py [--capability 90] [--json]

These are static figures for D = 512 and compute capability 9.0 (H100, H200), not times: a kernel whose registers spill
or whose product is no HGMMA (Hopper's instruction for whole warp groups) is slow, but one without that fault need not
be fast. `benchmarks/head_kernels.py` measures them on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, which Triton 3.9 warns about

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from partialfc.head.backends import gpu_kernels

WIDTH = 512
BLOCKS = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 64, 64, 4, 2),
)
ROWS = (2, 4, 8, 16)
TYPES = {
    "embeddings": "*bf16", "unit": "*bf16", "weights": "*bf16", "target_positions": "*i64", "classes": "*i64",
    "count": "*i64", "keys": "*i64", "skip": "*i64", "slots": "*i32",
    "first": "i32", "last": "i32", "G": "i32", "N": "i32", "D": "i32", "first_row": "i32",
    "scale": "fp32", "shift": "fp32", "threshold": "fp32", "zero_logit": "fp32",
    "momentum": "fp32", "decay": "fp32", "rate": "fp32",
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], warps: int, stages: int, capability: int, **types: str) -> Any:
    """Registers, spilled bytes, shared memory and matrix instructions of one form of a kernel."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, "*fp32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("G", "N", "D", "first")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "constexpr"},
    )
    result = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)", code)),
        "shared_bytes": result.metadata.shared,
        "hgmma": code.count("HGMMA"),
        "hmma": len(re.findall(r"\bHMMA", code)),
    }


def forms(capability: int) -> Iterator[dict[str, Any]]:
    """One line a form of a kernel."""
    for bg, bn, bk, warps, stages in BLOCKS:
        for conflicts in (False, True):
            constants = {"D": WIDTH, "BG": bg, "BN": bn, "BK": bk, "PRODUCT": True, "UPCAST": False}
            constants |= {"SUMS": True, "CONFLICTS": conflicts}
            figures = compiled(gpu_kernels.weights_kernel, constants, warps, stages, capability)
            yield (
                {"kernel": f"weights {bg} × {bn} × {bk}, {warps} warps, {stages} stages"}
                | {"conflicts": conflicts}
                | figures
            )
    for rows in ROWS:
        block = {"BN": rows, "BD": WIDTH}
        for dtype in ("*fp32", "*bf16"):
            figures = compiled(gpu_kernels.unit_kernel, block, 8, 1, capability, centers=dtype)
            yield {"kernel": f"unit, {rows} rows, centers {dtype[1:]}"} | figures
            figures = compiled(
                gpu_kernels.finish_kernel,
                block | {"UPDATE": True, "RATE_ON_DEVICE": False, "MOMENTUM": True},
                *(8, 1, capability),
                centers=dtype,
                momentum_buffer=dtype,
            )
            yield {"kernel": f"finish, {rows} rows, centers and momentum {dtype[1:]}"} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    options = parser.parse_args()
    if not options.json:
        print("| kernel | counts conflicts | registers | stack | spill instructions | shared | HGMMA | HMMA |")
        print("|---|---|---|---|---|---|---|---|")
    for line in forms(options.capability):
        if options.json:
            print(json.dumps(line), flush=True)
            continue
        conflicts = {True: "yes", False: "no", None: ""}[line.get("conflicts")]
        names = ("registers", "stack_bytes", "spill_instructions", "shared_bytes", "hgmma", "hmma")
        figures = " | ".join(f"{line[name]:,}" for name in names)
        print(f"| {line['kernel']} | {conflicts} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
