"""Compile the kernels as the host code launches them, for a card that need not be there."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Launch:
    """A launch that was recorded instead of made."""

    kernel: JITFunction
    grid: tuple
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def recorded():
    """Collect launches. The tensors may be of the meta device, so any size costs nothing."""
    launches, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(Launch(self, grid, args, kwargs))
    try:
        yield launches
    finally:
        JITFunction.run = run


@dataclass
class Compiled:
    """What the compiler made of a launch."""

    name: str
    registers: int
    stack: int
    shared: int
    instructions: int
    tensor_core: int
    shuffles: int


def source_of(launch: Launch) -> tuple[ASTSource, dict]:
    """Specialise the arguments as Triton's launcher does: 1 is a constant, and what divides by 16 is known to."""
    options = {name: launch.kwargs[name] for name in _OPTIONS if name in launch.kwargs}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    values |= {name: value for name, value in launch.kwargs.items() if name not in _OPTIONS}
    signature, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _NAMES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attrs), options


def compiled(launch: Launch, capability: int = 90) -> Compiled:
    """Compile a launch and read the machine code."""
    source, options = source_of(launch)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", sass, flags=re.MULTILINE)
    return Compiled(
        launch.name,
        int(numbers["REG"]),
        int(numbers["STACK"]) + int(numbers["LOCAL"]),
        made.metadata.shared,
        len(lines),
        sum("HGMMA" in line for line in lines),
        sum("SHFL" in line for line in lines),
    )
