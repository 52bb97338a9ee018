"""Reads the innermost loops of the matrix kernels as a processor would run them: a Markdown table of what is in them.

    python tools/read_assembly.py                                              # ARM: docs/arm.md
    python tools/read_assembly.py --cpu cortex-a76 --format Q4_K --show direct # the loops themselves

For each processor, format and function of `edgelm/kernels/tiles.py` and `slab_tiles.py`, per block of 32 inputs of 16
rows and per token: instructions, those of them that multiply, loads, and spills, which are loads from the stack and
stores to it. What is outside of the innermost loop is not counted. Nothing of it is run; see `tools/cross_compile.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Processors by LLVM's names, with the features that Linux lists (it never lists dotprod).
CPUS = ["cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "apple-m1", "apple-m2"]
LISTED = "+aes,+crc,+fp-armv8,+neon,+sha2,-sve"
FORMATS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16"]
# Instructions that multiply, and how many of them a block of 32 inputs, 16 rows and one token takes.
PRODUCTS = {"smmla": 16, "sdot": 32, **dict.fromkeys(("smull", "smull2", "smlal", "smlal2"), 64), "fmla": 128}
WIDENED = {"mul": "smull", "mla": "smlal"}  # of bytes that LLVM has widened before, where it knows them small
INSTRUCTION = re.compile(r"^\t([a-z]\w*(?:\.\w+)?)\s*(.*)")


class Loop(NamedTuple):
    """An innermost loop. product: the instruction that multiplies, "" where none does; blocks: that it works on."""

    function: str
    product: str
    blocks: float
    instructions: int
    products: int
    loads: int
    spills: int
    lines: list[str]

    def per_block(self, count: int) -> float:
        return count / self.blocks


def functions(assembly: str) -> dict[str, list[str]]:
    """Lines of generated functions by their names, such as "_tile.Q4_0.2"."""
    found = re.findall(r"^_?\"?edgelm\.(_\w+\.[\w.]+?)\"?:.*\n((?:(?!\.?Lfunc_end).*\n)*)", assembly, re.MULTILINE)
    return {name: body.splitlines() for name, body in found}


def innermost(lines: list[str]) -> list[list[str]]:
    """The loops of a function that have no loop in them: from a label to the last jump back to it."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"^(\.?L\w+):", line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        target = re.match(r"^\t(?:b|b\.\w+|cbn?z|tbn?z)\t.*?(\.?LBB\w+)", line)
        if target and labels.get(target[1], i) < i:
            ends[labels[target[1]]] = i
    spans = [span for span in ends.items() if not any(span[0] < a and b <= span[1] for a, b in ends.items())]
    return [lines[a : b + 1] for a, b in spans]


def read(function: str, lines: list[str], slab_bytes: int) -> Loop:
    """What is in the longest innermost loop of a function."""
    body = max(innermost(lines), key=len)
    found = [(match[1], match[2]) for line in body if (match := INSTRUCTION.match(line))]
    names = [mnemonic if ".8h" not in operands else WIDENED.get(mnemonic, mnemonic) for mnemonic, operands in found]
    counts = {product: names.count(product) for product in PRODUCTS}
    kind = [p for p in ("smmla", "sdot") if counts[p]] or [p for p in PRODUCTS if counts[p] and p != "fmla"] or ["fmla"]
    products = sum(counts[p] for p in kind)
    blocks = products / PRODUCTS[kind[0]]
    if function.startswith("_unpack"):
        stored = sum(16 * text.count("q") for name, text in found if name.startswith("st") and "[sp" not in text)
        kind, products, blocks = [""], 0, max(1, round(stored / slab_bytes))
    loads = [arguments for mnemonic, arguments in found if mnemonic.startswith("ld")]
    stack = [arguments for mnemonic, arguments in found if mnemonic.startswith(("ld", "st")) and "[sp" in arguments]
    return Loop(function, kind[0], blocks, len(found), products, len(loads), len(stack), body)


def loops(cpu: str, formats: list[str], features: str = LISTED) -> dict[str, list[Loop]]:
    """The innermost loops of each format: of `direct`, `unpack`, and of tiles from the largest to the smallest."""
    command = [sys.executable, Path(__file__).with_name("cross_compile.py"), "--cpu", cpu, f"--features={features}"]
    command += [f"linear_kernels:linear_{format.lower()}" for format in formats]
    code = functions(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {
        format: [read(name, lines, slab_bytes(format)) for name, lines in code.items() if name.split(".")[1] == format]
        for format in formats
    }


def slab_bytes(format: str) -> int:
    from edgelm.kernels.blocks import BLOCKS
    from edgelm.kernels.tiles import slab_block_bytes

    return slab_block_bytes(BLOCKS[format]) if format in BLOCKS else 1


def cell(found: list[Loop]) -> str:
    """Instructions per block of direct, unpack and the largest tile, and the spills."""
    by_kind: dict[str, Loop] = {}
    for loop in found:
        by_kind.setdefault(loop.function.split(".")[0], loop)
    counts = []
    for kind in ("_direct", "_unpack", "_tile", "_float_tile"):
        if loop := by_kind.get(kind):
            spills = f" ({loop.per_block(loop.spills):.0f} spilled)" if loop.spills else ""
            counts.append(f"{loop.per_block(loop.instructions):.0f}{spills}")
    return " / ".join(counts)


def table(cpus: list[str], formats: list[str], features: str) -> None:
    print(f"| processor | multiplies by | {' | '.join(formats)} |\n|{'---|' * (len(formats) + 2)}")
    for cpu in cpus:
        found = loops(cpu, formats, features)
        products = dict.fromkeys(loop.product for all_ in found.values() for loop in all_ if loop.product)
        print(f"| {cpu} | {', '.join(products)} | {' | '.join(map(cell, found.values()))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", nargs="+", default=CPUS)
    parser.add_argument("--format", nargs="+", default=FORMATS)
    parser.add_argument("--features", default=LISTED, help="what the system lists beside the processor's name")
    parser.add_argument("--show", metavar="FUNCTION", help="print the loops of direct, unpack or tile themselves")
    parser.add_argument("--json", action="store_true", help="the figures, one loop a line")
    options = parser.parse_args()
    if not options.show and not options.json:
        return table(options.cpu, options.format, options.features)
    for cpu in options.cpu:
        for format, found in loops(cpu, options.format, options.features).items():
            for loop in found:
                if options.json:
                    print(json.dumps({"cpu": cpu, "format": format, **loop._replace(lines=[])._asdict()}))
                elif loop.function.split(".")[0].endswith(options.show):
                    print(f"{cpu} {loop.function}", *loop.lines, sep="\n")
    return None


if __name__ == "__main__":
    main()
