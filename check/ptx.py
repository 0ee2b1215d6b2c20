"""PTX, the assembly to which Triton compiles a kernel for NVIDIA, as data for emulator.py."""

import functools
import re
from dataclasses import dataclass, field

LABEL = re.compile(r"([$\w]+):(?!:)\s*")
DEBUG = re.compile(r"\$L__(tmp|func)")  # labels that no branch names
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)", re.DOTALL)
OPERATION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
OPENING, CLOSING = "{[(", "}])"
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Address:
    """[base + offset], in bytes; [base, {x, y}] of a tensor map."""

    base: object  # a register, a symbol or a number
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Instruction:
    opcode: str  # the whole of it: ld.global.v4.b32
    operands: tuple  # names of registers and symbols, ints (the bits of a float), Address, tuples
    guard: str | None  # the predicate on which it is executed
    negated: bool  # it is executed where the predicate is false
    line: str  # of the kernel: attention.py:119

    @functools.cached_property
    def name(self):
        return self.opcode.partition(".")[0]

    @functools.cached_property
    def parts(self):
        return self.opcode.split(".")[1:]


@dataclass
class Program:
    """A kernel. Its blocks of instructions are entered at the first alone; bar.sync begins one."""

    name: str
    arch: int  # 80 for sm_80
    threads: int
    parameters: list  # names
    strings: dict  # constants by name, such as the text of an assertion
    bits: dict = field(default_factory=dict)  # of each register, or prefix of registers
    blocks: list = field(default_factory=lambda: [[]])
    labels: dict = field(default_factory=dict)  # name: index of a block

    def width(self, register):
        """Bits of a register; 1 of a predicate."""
        return self.bits.get(register) or self.bits[register.rstrip("0123456789")]


@functools.lru_cache(64)  # a kernel is launched several times
def parse(text):
    """The Program of the one kernel in text."""
    head, _, body = text[text.index(".entry") :].partition("{")
    listed = head[head.index("(") + 1 : head.rindex(")")]
    program = Program(
        name=re.search(r"\.entry\s+(\w+)", head)[1],
        arch=int(re.search(r"\.target\s+sm_(\d+)", text)[1]),
        threads=int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)[1]),
        parameters=[re.search(r"(\w+)(\[\d+\])?\s*$", p)[1] for p in listed.split(",")],
        strings={
            name: bytes(map(int, numbers.split(","))).rstrip(b"\0").decode(errors="replace")
            for name, numbers in re.findall(r"(\w+)\[\d+\] = \{([\d, ]+)\}", text)
        },
    )
    scopes, count = [], 0
    for statement, line in _statements(body):
        while statement:  # what may stand before an instruction
            if statement[0] == "{":
                count += 1
                scopes.append(count)
                statement = statement[1:].lstrip()
            elif statement[0] == "}":
                scopes = scopes[:-1]  # the last one ends the kernel
                statement = statement[1:].lstrip()
            elif found := LABEL.match(statement):
                if not DEBUG.match(found[1]):
                    program.blocks.append([])
                    program.labels[_scoped(found[1], scopes)] = len(program.blocks) - 1
                statement = statement[found.end() :]
            else:
                break
        if found := REGISTERS.fullmatch(statement):
            for register in found[2].split(","):
                program.bits[register.partition("<")[0].strip()] = BITS[found[1]]
        elif statement and statement[0] != ".":
            instruction = _instruction(statement, line, scopes)
            if instruction.opcode.startswith("bar.sync"):
                program.blocks.append([])
            program.blocks[-1].append(instruction)
            if instruction.name in ("bra", "ret"):
                program.blocks.append([])
    return program


def _statements(body):
    """(statement, line of the kernel's source) of a body."""
    statement, line = "", "?"
    for row in body.splitlines():
        row, _, comment = row.partition("//")
        row = row.strip()
        if row.startswith(".loc"):
            line = comment.strip().rpartition(":")[0] or line
        elif not row.startswith((".file", ".section", ".pragma")):
            *ended, rest = row.split(";")
            for part in ended:
                yield f"{statement} {part}".strip(), line
                statement = ""
            statement = f"{statement} {rest}".strip()
    yield statement, line


def _scoped(label, scopes):
    """Labels of inline assembly belong to their scope, those of the compiler to the kernel."""
    return label if label.startswith("$") or not scopes else f"{label} {scopes[-1]}"


def _instruction(text, line, scopes):
    negation, guard, opcode, rest = OPERATION.fullmatch(text).groups()
    operands = tuple(_operand(part) for part in _split(rest))
    if opcode.startswith("bra"):
        operands = (_scoped(operands[0], scopes),)
    return Instruction(opcode, operands, guard, negation == "!", line)


def _split(text):
    """The parts of text between commas outside of brackets."""
    depth, part = 0, ""
    for c in text:
        depth += (c in OPENING) - (c in CLOSING)
        if c == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += c
    if part.strip():
        yield part.strip()


def _operand(text):
    if text[0] in "{(":
        return tuple(_operand(part) for part in _split(text[1:-1]))
    if text[0] == "[":
        place, *coordinates = _split(text[1:-1])
        base, _, offset = place.partition("+")
        return Address(
            _operand(base.strip()),
            int(offset or "0", 0),
            _operand(coordinates[0]) if coordinates else (),
        )
    if "|" in text:
        return tuple(text.split("|"))
    if FLOAT.fullmatch(text):
        return int(text[2:], 16)
    if INTEGER.fullmatch(text):
        return int(text.rstrip("U"), 0)
    return text
