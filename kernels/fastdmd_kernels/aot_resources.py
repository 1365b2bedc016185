"""What a compiled kernel needs of a GPU, read from the compiler's report and from the machine code.

No GPU: NVIDIA's registers and spills are of `ptxas -v`, AMD's of the metadata in the assembly. Instructions
in a loop are counted in the machine code, where it is known what became of it.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Resources:
    """Hold what one kernel needs. Counts are of instructions as they stand, not of executions."""

    registers: int  # of a thread; AMD: VGPRs with AGPRs
    spills: int  # NVIDIA: bytes stored and loaded; AMD: registers and bytes of scratch
    wgmma: int
    tcgen05: int
    mma: int
    mfma: int
    async_copies: int  # cp.async, TMA loads; AMD: buffer loads to LDS
    loop_async_copies: int  # in the innermost loop that has most of them
    code_bytes: int
    serialized: list[str]  # what the compiler says of wgmma that it could not run asynchronously

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


# an instruction that marks a loop as one that does the work, and the asynchronous copies to shared memory
_SASS_MMA = re.compile(r"\b(?:[HIQD]GMMA|UTC\w*MMA|[HIQD]MMA)\b")
_SASS_COPY = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b")
_SASS_LABEL, _SASS_BRANCH = re.compile(r"^\s*(\.L_\w+):"), re.compile(r"\bBRA\b.*?(\.L_\w+)")
_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s")
_AMD_MMA = re.compile(r"\bv_mfma_")
_AMD_COPY = re.compile(r"\bbuffer_load_\w+ .*\blds\b|\bglobal_load_lds_")
_AMD_LABEL, _AMD_BRANCH = re.compile(r"^(\.LBB\w+):"), re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)")


def nvidia(ptx: str, sass: str, log: str, cubin: bytes) -> Resources:
    """Read the resources of an NVIDIA kernel; `log` is what `ptxas -v` printed."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"no resources in the log of ptxas: {log!r}")
    lines = sass.splitlines()
    return Resources(
        registers=max(map(int, registers)),
        spills=sum(int(n) for pair in spills for n in pair),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        tcgen05=len(re.findall(r"\btcgen05\.mma", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        mfma=0,
        async_copies=_count(_SASS_COPY, lines),
        loop_async_copies=_in_loops(lines, _SASS_LABEL, _SASS_BRANCH, _SASS_MMA, _SASS_COPY),
        code_bytes=_code_bytes(cubin),
        serialized=[line.strip() for line in log.splitlines() if "serializ" in line.lower()],
    )


def multiplying_loop(sass: str) -> int:
    """Return the instructions of the shortest loop of NVIDIA code that multiplies matrices; 0 for none.

    It is the loop over tiles: waits stand behind the code, out of line, and branch back into it, which looks
    like longer loops.
    """
    lines = sass.splitlines()
    bodies = [lines[first : last + 1] for first, last in _loops(lines, _SASS_LABEL, _SASS_BRANCH)]
    lengths = (_count(_SASS_INSTRUCTION, body) for body in bodies if _count(_SASS_MMA, body))
    return min(lengths, default=0)


def amd(assembly: str, hsaco: bytes) -> Resources:
    def of(key: str) -> int:
        found = re.findall(rf"\.{key}:\s+(\d+)", assembly)
        if not found:
            raise ValueError(f"no .{key} in the assembly")
        return sum(map(int, found))

    lines = [line.split(";")[0] for line in assembly.splitlines()]
    return Resources(
        registers=of("vgpr_count"),
        spills=of("vgpr_spill_count") + of("sgpr_spill_count") + of("private_segment_fixed_size"),
        wgmma=0,
        tcgen05=0,
        mma=0,
        mfma=_count(_AMD_MMA, lines),
        async_copies=_count(_AMD_COPY, lines),
        loop_async_copies=_in_loops(lines, _AMD_LABEL, _AMD_BRANCH, _AMD_MMA, _AMD_COPY),
        code_bytes=_code_bytes(hsaco),
        serialized=[],
    )


def _count(pattern: re.Pattern[str], lines: Iterable[str]) -> int:
    return sum(bool(pattern.search(line)) for line in lines)


def _loops(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Find the (first, last) line of every branch back to a label."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := label.search(line))}
    for i, line in enumerate(lines):
        if (match := branch.search(line)) and labels.get(match[1], i) < i:
            yield labels[match[1]], i


def _in_loops(
    lines: list[str],
    label: re.Pattern[str],
    branch: re.Pattern[str],
    mma: re.Pattern[str],
    copy: re.Pattern[str],
) -> int:
    """Count the copies in the innermost loop that has most.

    Loops that neither copy nor multiply are waits and do not count.
    """
    work = {
        (first, last): _count(copy, lines[first : last + 1])
        for first, last in set(_loops(lines, label, branch))
        if any(mma.search(line) or copy.search(line) for line in lines[first : last + 1])
    }
    return max(
        (
            copies
            for (first, last), copies in work.items()
            if not any(first <= i and j <= last for i, j in work if (i, j) != (first, last))
        ),
        default=0,
    )


def _code_bytes(elf: bytes) -> int:
    """Add up the sizes of the .text sections of a 64-bit little-endian ELF."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, offset + i * size) for i in range(count)]
    names = sections[names_index][4]
    return sum(s[5] for s in sections if elf[names + s[0] : names + s[0] + 5] == b".text")
