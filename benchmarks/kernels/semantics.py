"""What the integer instructions of sm_90 compute, as far as they decide on addresses, masks and trip counts.

There is no manual of this instruction set. What is here was read from compiled kernels and checked against addresses
that are known (tests/benchmarks/test_kernels.py). Numbers are arrays with one uint32 for each thread of a program.
Floating point is not computed: a result is zero, as if all frames were zero. The exceptions are the conversions and the
reciprocal by which the compiler divides integers.
"""
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sass import Instruction

__all__ = ['DATA', 'Program', 'address', 'compute']

Array = NDArray[Any]
_U32, _U64 = np.uint32, np.uint64
_MASK = (1 << 32) - 1

# Only data goes through these; they write zeros.
DATA = {
    'FADD', 'FMUL', 'FFMA', 'FSEL', 'FMNMX', 'FRND', 'FCHK', 'HADD2', 'HMUL2', 'HFMA2', 'HMNMX2', 'F2FP', 'F2F',
    'HSETP2', 'HMMA', 'HGMMA', 'FSWZADD', 'I2FP', 'DADD', 'DMUL', 'DFMA', 'BMMA', 'IMMA'}


class Program:
    """Registers, predicates and shared memory of one program of a launch."""

    def __init__(self, threads: int, program_id: tuple[int, int, int], constants: bytes, shared: int) -> None:
        self.threads, self.program_id, self.constants = threads, program_id, constants
        self.thread = np.arange(threads, dtype=_U32)
        self.zero = np.zeros(threads, _U32)
        self.register: dict[str, Array] = {}
        self.predicate: dict[str, Array] = {
            'PT': np.ones(threads, bool), 'UPT': np.ones(threads, bool)}
        self.shared = np.zeros(0x400 + shared + 4096, np.uint8)

    def constant(self, offset: int) -> int:
        """A word of the constant bank."""
        return int.from_bytes(self.constants[offset:offset + 4].ljust(4, b'\0'), 'little')

    def full(self, value: int) -> Array:
        return np.full(self.threads, value & _MASK, _U32)

    def read(self, name: str) -> Array:
        return self.register.get(name, self.zero)

    def is_true(self, text: str) -> Array:
        """A predicate, or its complement."""
        value = self.predicate.get(text.lstrip('!'), self.zero.astype(bool))
        return ~value if text.startswith('!') else value


def _value(program: Program, text: str) -> Array:
    """An operand as it stands, without a sign in front of it that is no literal's."""
    if text[0] == '-' and not re.match(r'-\d|-0x', text):
        return (~_value(program, text[1:])) + _U32(1)
    if text[0] == '~':
        return ~_value(program, text[1:])
    if text[0] == '|':
        return np.abs(_value(program, text.strip('|')).view(np.int32)).view(_U32)
    if text in ('RZ', 'URZ', 'SRZ'):
        return program.zero
    if match := re.match(r'U?R\d+', text):
        return program.read(match[0])
    if match := re.match(r'c\[0x(\w+)\]\[0x(\w+)\]', text):
        return program.full(program.constant(int(match[2], 16)) if int(match[1], 16) == 0 else 0)
    try:
        return program.full(int(text, 0))
    except ValueError:
        return program.full(0)


def _high(text: str) -> str:
    """The operand that holds the upper word of a pair."""
    sign = text[0] if text[0] in '-~' else ''
    text = text[len(sign):]
    if match := re.match(r'(U?R)(\d+)', text):
        return f'{sign}{match[1]}{int(match[2]) + 1}'
    if match := re.match(r'c\[(\w+)\]\[0x(\w+)\]', text):
        return f'{sign}c[{match[1]}][{int(match[2], 16) + 4:#x}]'
    return 'RZ' if not text.startswith('-') else '-1'


def _pair(program: Program, text: str) -> Array:
    """An operand of 64 bits."""
    low, high = _value(program, text), _value(program, _high(text))
    return low.astype(_U64) | high.astype(_U64) << _U64(32)


def _terms(program: Program, operands: list[str]) -> Array:
    """The sum of operands with its carries, as it is needed for numbers of more words: -x is ~x + 1."""
    total = np.zeros(program.threads, _U64)
    for text in operands:
        if (text[0] == '-' and text[1] in 'UR') or text.startswith('-c'):
            total += (~_value(program, text[1:])).astype(_U64) + _U64(1)
        else:
            total += _value(program, text).astype(_U64)
    return total


def _signed(value: Array) -> Array:
    return value.view(np.int32).astype(np.int64)


def _lut(table: int, a: Array, b: Array, c: Array) -> Array:
    """Any bitwise function of three operands, by its truth table."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _halves(texts: list[str]) -> int:
    """Two half-precision literals as one word: a move of a constant in disguise."""
    bits = [int(np.float16(float(text)).view(np.uint16)) for text in texts]
    return bits[0] << 16 | bits[1]


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    'LT': np.less, 'LE': np.less_equal, 'GT': np.greater, 'GE': np.greater_equal, 'EQ': np.equal, 'NE': np.not_equal}


def _isetp(program: Program, parts: list[str], operands: list[str]) -> Array:
    a, b = _value(program, operands[2]), _value(program, operands[3])
    if 'U32' not in parts:
        a, b = _signed(a), _signed(b)
    result = _COMPARE[parts[0]](a, b)
    if 'EX' in parts:  # the upper words: equal ones leave it to the lower words
        strict = {'GE': 'GT', 'LE': 'LT', 'EQ': 'EQ', 'NE': 'NE'}.get(parts[0], parts[0])
        lower = program.is_true(operands[5])
        result = _COMPARE[strict](a, b) | (a == b) & lower if strict != 'EQ' else (a == b) & lower
    return _combined(program, parts, result, operands[4])


def _combined(program: Program, parts: list[str], result: Array, other: str) -> Array:
    if 'OR' in parts:
        return result | program.is_true(other)
    if 'XOR' in parts:
        return result ^ program.is_true(other)
    return result & program.is_true(other)


def _fsetp(program: Program, parts: list[str], operands: list[str]) -> Array:
    def number(text: str) -> Array:
        bare = text.strip('-|')
        if re.match(r'U?R|c\[', bare):
            value = _value(program, bare).view(np.float32).astype(np.float64)
        else:
            value = np.full(program.threads, float(bare.replace('QNAN', 'nan').replace('INF', 'inf')))
        if '|' in text:
            value = np.abs(value)
        return -value if text.startswith('-') else value

    name = parts[0].removesuffix('U') if parts[0] in ('LTU', 'LEU', 'GTU', 'GEU', 'EQU', 'NEU') else parts[0]
    result = _COMPARE[name](number(operands[2]), number(operands[3])) if name in _COMPARE else program.zero.astype(bool)
    return _combined(program, parts, result, operands[4])


def _shift(program: Program, parts: list[str], a: Array, by: Array, c: Array) -> Array:
    """A funnel shift of the words c:a."""
    both = a.astype(_U64) | c.astype(_U64) << _U64(32)
    by = np.minimum(by, 63).astype(_U64)
    if parts[0] == 'L':
        if 'HI' in parts:
            return ((both << by) >> _U64(32)).astype(_U32)
        return np.where(by < 32, a.astype(_U64) << by, _U64(0)).astype(_U32)
    if 'HI' in parts:
        if 'S32' in parts:
            return (_signed(c) >> np.minimum(by, 31).astype(np.int64)).astype(np.int64).astype(_U32)
        return (c.astype(_U64) >> by).astype(_U32)
    return (both >> by).astype(_U32)


def _permute(a: Array, selector: Array, c: Array) -> Array:
    both = a.astype(_U64) | c.astype(_U64) << _U64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        pick = selector >> _U32(4 * byte) & _U32(15)
        value = (both >> ((pick & _U32(7)).astype(_U64) * _U64(8))).astype(_U32) & _U32(255)
        value = np.where(pick & _U32(8), np.where(value & _U32(128), _U32(255), _U32(0)), value)
        result |= value << _U32(8 * byte)
    return result


def _shuffle(program: Program, parts: list[str], source: Array, lane: Array) -> Array:
    warp = program.thread & ~_U32(31)
    own = program.thread & _U32(31)
    other = {
        'BFLY': own ^ lane, 'IDX': lane & _U32(31), 'UP': np.where(own >= lane, own - lane, own),
        'DOWN': np.minimum(own + lane, 31)}[parts[0]]
    result: Array = source[warp | other & _U32(31)]
    return result


def _vote(program: Program, parts: list[str], operands: list[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Whether a predicate holds for any or for all threads of a warp, and for which ones."""
    votes = program.is_true(operands[-1]).reshape(-1, 32)
    predicates, registers = {}, {}
    for name in operands[:-1]:
        if re.fullmatch(r'U?R\d+', name):
            ballot = (votes.astype(_U64) << np.arange(32, dtype=_U64)).sum(1).astype(_U32)
            registers[name] = np.repeat(ballot, 32)
        else:
            predicates[name] = np.repeat((votes.all if 'ALL' in parts else votes.any)(1), 32)
    return registers, predicates


def _special(program: Program, name: str) -> Array:
    if name == 'SR_TID.X':
        return program.thread
    if name == 'SR_LANEID':
        return program.thread & _U32(31)
    if name.startswith('SR_CTAID.'):
        return program.full(program.program_id['XYZ'.index(name[-1])])
    return program.zero  # of the y and z of a thread, of a cluster, clocks


def address(program: Program, text: str) -> Array:
    """The address in the last brackets of an operand, 64 bits."""
    inside = re.findall(r'\[([^\]]*)\]', text)[-1]
    total = np.zeros(program.threads, _U64)
    for term in re.findall(r'[+-]?[^+-]+', inside):
        term = term.strip()
        negative, term = term.startswith('-'), term.lstrip('+-')
        if term.endswith('.64'):
            value = _pair(program, term[:-3])
        elif match := re.match(r'(U?R\d+)\.X(\d+)', term):
            value = _value(program, match[1]).astype(_U64) * _U64(int(match[2]))
        else:
            value = _value(program, term.removesuffix('.U32')).astype(_U64)
        total = total - value if negative else total + value
    return total


def compute(program: Program, instruction: Instruction) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """Registers and predicates that an instruction of arithmetic writes; None if it is not known here."""
    base, operands = instruction.base, list(instruction.operands)
    parts = instruction.name.split('.')[1:]
    if base in ('ISETP', 'UISETP', 'FSETP'):
        result = (_fsetp if base == 'FSETP' else _isetp)(program, parts, operands)
        return {}, {operands[0]: result}
    if base in ('PLOP3', 'UPLOP3'):
        # as words: all bits of one are equal
        a, b, c = (np.where(program.is_true(v), _U32(_MASK), _U32(0)) for v in operands[2:5])
        return {}, {operands[k]: _lut(int(operands[5 + k], 16), a, b, c) != 0 for k in (0, 1)}
    if base == 'R2P':
        bits = _value(program, operands[1]) >> _U32(8 * int(parts[0][1]) if parts else 0)
        mask = int(operands[2], 16)
        return {}, {f'P{k}': (bits >> _U32(k) & _U32(1)) != 0 for k in range(7) if mask >> k & 1}
    if base in ('VOTE', 'VOTEU'):
        return _vote(program, parts, operands)
    outputs = []
    while operands and re.fullmatch(r'U?P[T\d]', operands[0]):
        outputs.append(operands.pop(0))
    if not operands:
        return None
    target, operands = operands[0], operands[1:]
    if base not in ('SEL', 'USEL', 'FSEL'):
        while operands and re.fullmatch(r'U?P[T\d]', operands[0]):  # carries come behind the sum
            outputs.append(operands.pop(0))
    found = _arithmetic(program, base.removeprefix('U'), parts, operands, outputs)
    if found is None:
        return None
    value, predicates = found
    registers = {target: value.astype(_U32)}
    if value.dtype == _U64:
        registers[_high(target)] = (value >> _U64(32)).astype(_U32)
    return registers, predicates


def _arithmetic(
        program: Program, base: str, parts: list[str], operands: list[str], outputs: list[str],
) -> tuple[Array, dict[str, Array]] | None:
    def value(position: int) -> Array:
        return _value(program, operands[position])

    predicates: dict[str, Array] = {}
    result: Array
    if base in ('MOV', 'R2UR'):
        result = value(0)
    elif base == 'IADD3' and '64' in parts:
        result = _pair(program, operands[0]) + _pair(program, operands[1]) + _pair(program, operands[2])
    elif base in ('IADD3', 'VIADD', 'IADD'):
        total = _terms(program, [v for v in operands if not re.fullmatch(r'!?U?P[T\d]', v)])
        for carry in (v for v in operands if re.fullmatch(r'!?U?P[T\d]', v)):
            total += program.is_true(carry).astype(_U64)
        carried = total >> _U64(32)
        predicates = {name: carried > k for k, name in enumerate(outputs)}
        result = total.astype(_U32)
    elif base == 'IMAD':
        result = _multiply(program, parts, operands)
    elif base == 'LOP3':
        result = _lut(int(operands[3], 16), value(0), value(1), value(2))
        predicates = {name: (result != 0) | program.is_true(operands[4]) for name in outputs}
    elif base == 'SHF':
        result = _shift(program, parts, value(0), value(1), value(2))
    elif base == 'LEA':
        result, predicates = _lea(program, parts, operands, outputs)
    elif base == 'SEL':
        result = np.where(program.is_true(operands[2]), value(0), value(1))
    elif base == 'SGXT':
        bits = int(operands[1], 0)
        result = value(0) & _U32((1 << bits) - 1)
        if 'U32' not in parts:
            result = np.where(result >> _U32(bits - 1) & _U32(1), result | _U32(_MASK & -(1 << bits)), result)
    elif base == 'IABS':
        result = np.abs(value(0).view(np.int32)).view(_U32)
    elif base == 'PRMT':
        result = _permute(value(0), value(1), value(2))
    elif base == 'P2R':
        mask = int(operands[2], 16)
        packed = np.zeros(program.threads, _U32)
        for k in range(7):
            packed |= np.where(program.is_true(f'P{k}'), _U32(1 << k), _U32(0))
        shift = _U32(8 * int(parts[0][1]) if parts else 0)
        result = (value(1) & ~(_U32(mask) << shift)) | (packed & _U32(mask)) << shift
    elif base in ('VIMNMX', 'IMNMX'):
        result = _smaller(program, parts, value(0), value(1), operands[2])
    elif base == 'VIADDMNMX':
        result = _smaller(program, parts, value(0) + value(1), value(2), operands[3])
    elif base in ('S2R', 'S2UR'):
        result = _special(program, operands[0])
    elif base == 'CS2R':
        result = program.zero if '32' in parts else program.zero.astype(_U64)
    elif base in ('LDC', 'LDCU') and 'c[0x0]' in operands[0]:
        result = _pair(program, operands[0]) if '64' in parts else value(0)
    elif base == 'SHFL':
        result = _shuffle(program, parts, value(0), value(1))
    elif base == 'HFMA2' and operands[0].strip('-') == 'RZ' and operands[1].strip('-') == 'RZ' and len(operands) == 4:
        result = program.full(_halves(operands[2:]))
    elif base == 'I2F':
        number = value(0).astype(np.float64) if 'U32' in parts else _signed(value(0)).astype(np.float64)
        near = number.astype(np.float32)
        up = np.nextafter(near, np.float32(np.inf))
        result = np.where(('RP' in parts) & (near < number), up, near).astype(np.float32).view(_U32)
    elif base == 'MUFU' and 'RCP' in parts:
        with np.errstate(all='ignore'):
            result = (np.float32(1) / value(0).view(np.float32)).view(_U32)
    elif base == 'F2I':
        with np.errstate(all='ignore'):
            number = np.nan_to_num(value(0).view(np.float32).astype(np.float64))
        limits = (0, _MASK) if 'U32' in parts else (-2**31, 2**31 - 1)
        result = np.clip(np.trunc(number), *limits).astype(np.int64).astype(_U32)
    elif base in DATA or base in ('MUFU', 'ATOMG', 'ATOMS'):
        result = program.zero
        predicates = {name: program.zero.astype(bool) for name in outputs}
    else:
        return None
    return result, {name: v for name, v in predicates.items() if name not in ('PT', 'UPT')}


def _smaller(program: Program, parts: list[str], a: Array, b: Array, smaller: str) -> Array:
    """The smaller one of two numbers, or the larger one, as a predicate says."""
    less = a < b if 'U32' in parts else a.view(np.int32) < b.view(np.int32)
    return np.where(less == program.is_true(smaller), a, b)


def _multiply(program: Program, parts: list[str], operands: list[str]) -> Array:
    a, b = _value(program, operands[0]), _value(program, operands[1])
    if 'WIDE' in parts or 'HI' in parts:
        if 'U32' in parts:
            product = a.astype(_U64) * b.astype(_U64)
        else:
            product = (_signed(a) * _signed(b)).view(_U64)
        product = product + _pair(program, operands[2])
        return product if 'WIDE' in parts else (product >> _U64(32)).astype(_U32)
    result = a * b + _value(program, operands[2])
    if 'X' in parts:
        result = result + program.is_true(operands[3]).astype(_U32)
    return result


def _lea(
        program: Program, parts: list[str], operands: list[str], outputs: list[str],
) -> tuple[Array, dict[str, Array]]:
    operands = list(operands)
    carry = program.is_true(operands.pop()) if 'X' in parts else None
    by = int(operands.pop(), 0)
    a, b = _value(program, operands[0]), _value(program, operands[1])
    if 'HI' in parts:
        upper = _value(program, operands[2]) if len(operands) > 2 else program.zero
        if 'SX32' in parts:
            upper = (a.view(np.int32) >> 31).view(_U32)
        both = a.astype(_U64) | upper.astype(_U64) << _U64(32)
        a = ((both << _U64(by)) >> _U64(32)).astype(_U32)
    else:
        a = a << _U32(by)
    total = a.astype(_U64) + b.astype(_U64)
    if carry is not None:
        total += carry.astype(_U64)
    return total.astype(_U32), {name: total >> _U64(32) != 0 for name in outputs}
