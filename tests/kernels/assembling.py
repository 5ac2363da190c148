"""PTX to machine code, as the driver does it when it loads an engine."""

import re
import subprocess
import tempfile
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas


def assemble(ptx: str, capability: int) -> bytes:
    """Machine code of a PTX text, by the assembler that Triton carries."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(capability).path, f"--gpu-name={target.group(1)}", str(source), "-o", str(binary)]
        subprocess.run(command, check=True)
        return binary.read_bytes()
