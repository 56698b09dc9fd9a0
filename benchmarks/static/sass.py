"""Machine code: what nvdisasm and cuobjdump print, as instructions and resources.

The instructions' names are in NVIDIA's CUDA Binary Utilities, "Instruction Set Reference".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_LABEL = re.compile(r"(?P<label>[.$]\w+):")
_CODE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P[0-9T]+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*);"
)
_WIDTH = re.compile(r"\.[US]?(?P<bits>8|16|32|64|128|256)(?=\.|$)")


class Instruction(NamedTuple):
    """One line of machine code."""

    opcode: str

    @property
    def stem(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int:
        """Bytes that a memory access moves for a thread; 4 where the opcode names no width."""
        match = _WIDTH.search(self.opcode)
        return 4 if match is None else int(match["bits"]) // 8


def parse(text: str) -> Sequence[Instruction]:
    """The instructions in what ``nvdisasm -c`` prints of one kernel."""
    instructions: list[Instruction] = []
    jumps_to_itself: list[str] = []
    end = 0
    for row in text.splitlines():
        if match := _LABEL.match(row):
            jumps_to_itself.append(f"`({match['label']})")
        elif match := _CODE.search(row):
            instructions.append(Instruction(match["opcode"]))
            # NOP, and a jump to itself, fill up the end of the code.
            if match["opcode"] != "NOP" and match["operands"].strip() not in jumps_to_itself:
                end = len(instructions)
            jumps_to_itself.clear()
    if not end:
        raise ValueError("the disassembly holds no instruction")
    return instructions[:end]


def parse_resources(text: str) -> dict[str, int]:
    """What ``cuobjdump -res-usage`` prints of one kernel, by name: ``REG``, ``STACK``."""
    line = re.search(r"^ *(REG:.*)$", text, re.MULTILINE)
    if line is None:
        raise ValueError(f"cuobjdump names no resources: {text.strip()!r}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line[1])}
