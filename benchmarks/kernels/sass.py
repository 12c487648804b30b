"""Machine code of a kernel (SASS) as a list of instructions, and what can be counted in it without running it."""
import re
from typing import Any, NamedTuple

__all__ = ['Instruction', 'Loop', 'counts', 'loops', 'parse', 'registers']

_LINE = re.compile(r'^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*)\s*([^;]*);', re.M)
_REGISTER = re.compile(r'\b(U?R\d+)\b(\.64)?')
# these have no destination, whatever their first operand is
_NO_RESULT = {
    'STG', 'STS', 'STSM', 'STL', 'RED', 'BAR', 'BRA', 'EXIT', 'LDGSTS', 'LDGDEPBAR', 'DEPBAR', 'WARPGROUP', 'BSSY',
    'BSYNC', 'BREAK', 'WARPSYNC', 'ENDCOLLECTIVE', 'NOP', 'MEMBAR', 'FENCE', 'CCTL', 'R2P', 'ERRBAR', 'RET', 'CALL'}
# these write one or two predicates
_COMPARISONS = {'ISETP', 'UISETP', 'FSETP', 'HSETP2', 'PLOP3', 'UPLOP3', 'FCHK'}
_LOADS = {'LDG', 'LDS', 'LDC', 'LDL', 'ULDC'}


class Instruction(NamedTuple):
    """One instruction: its byte address, the predicate that guards it, its full name, and its operands as text."""
    address: int
    guard: str
    name: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        """The name without what qualifies it: LDG of LDG.E.128."""
        return self.name.split('.')[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        last = self.operands[-1] if self.operands else ''
        return int(last, 16) if self.base in ('BRA', 'BSSY', 'CALL') and last.startswith('0x') else None

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for a thread."""
        for suffix, size in (('128', 16), ('64', 8), ('U8', 1), ('S8', 1), ('U16', 2), ('S16', 2)):
            if suffix in self.name.split('.')[1:]:
                return size
        return 4


class Loop(NamedTuple):
    """A backward branch: the first and the last instruction that it repeats."""
    first: int
    last: int


def parse(text: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``, without the padding behind the last one.

    Raises:
        ValueError: There are none.
    """
    found = []
    for address, guard, name, operands in _LINE.findall(text):
        operands = re.sub(r'\s+[?&]\S+', '', operands)  # scheduling notes of newer architectures
        # commas within brackets do not separate operands
        parts = tuple(
            part.strip().replace('.reuse', '') for part in re.split(r',(?![^\[]*\])', operands) if part.strip())
        found.append(Instruction(int(address, 16), guard, name.rstrip(';'), parts))
    while found and found[-1].base in ('NOP', 'BRA') and found[-1].target in (None, found[-1].address):
        found.pop()
    if not found:
        raise ValueError('text holds no instructions, it must be what cuobjdump -sass prints')
    return found


def loops(code: list[Instruction]) -> list[Loop]:
    """All loops, in the order of their ends."""
    at = {instruction.address: index for index, instruction in enumerate(code)}
    return [
        Loop(at[i.target], index) for index, i in enumerate(code)
        if i.base == 'BRA' and i.target is not None and i.name != 'BRA.DIV' and i.target < i.address
        and not _is_way_back(code, index)]


def _is_way_back(code: list[Instruction], index: int) -> bool:
    """Whether a branch returns from a rare detour, which the compiler puts behind the end of the kernel."""
    return not code[index].guard and any(i.base == 'EXIT' and not i.guard for i in code[:index])


def counts(code: list[Instruction]) -> dict[str, Any]:
    """What a report says about the code."""
    loads = [i for i in code if i.base in ('LDG', 'LDGSTS')]
    stores = [i for i in code if i.base == 'STG']
    barriers = [index for index, i in enumerate(code) if i.base == 'BAR']
    found = loops(code)
    inside = [sum(loop.first <= index <= loop.last for index in barriers) for loop in found]
    return {
        'instructions': len(code),
        'tensor_cores': sorted({i.base for i in code if i.base in ('HGMMA', 'HMMA')}),
        'loads': len(loads), 'wide_loads': sum(i.width == 16 for i in loads),
        'stores': len(stores), 'wide_stores': sum(i.width == 16 for i in stores),
        'loops': len(found), 'barriers': len(barriers), 'barriers_in_loop': max(inside, default=0),
    }


def registers(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Names of the registers that an instruction writes, and of those that it reads."""
    operands = list(instruction.operands)
    written: list[str] = []
    base = instruction.base
    if base not in _NO_RESULT and operands:
        while operands and re.fullmatch(r'U?P[T\d]', operands[0]):
            written.append(operands.pop(0))
            if base in _COMPARISONS and len(written) == 2:
                break
        match = re.fullmatch(r'(U?R)(\d+)', operands[0]) if operands else None
        if match and base not in _COMPARISONS and base != 'HGMMA':
            written += [f'{match[1]}{int(match[2]) + k}' for k in range(_results(instruction))]
            operands.pop(0)
            while operands and re.fullmatch(r'U?P[T\d]', operands[0]):  # carries come behind the sum
                written.append(operands.pop(0))
    read = [instruction.guard.lstrip('!')] if instruction.guard else []
    for operand in operands:
        for name, wide in _REGISTER.findall(operand):
            read += [name] + ([_next(name)] if wide else [])
        read += re.findall(r'\bU?P\d\b', operand)
    if base == 'HMMA':  # rows, columns and what they are added to
        for operand, number in zip(operands, (4, 2, 4)):
            if operand.startswith('R') and operand != 'RZ':
                read += [f'R{int(operand[1:]) + k}' for k in range(1, number)]
    if base in ('STG', 'STS') and re.fullmatch(r'R\d+', instruction.operands[-1]):
        first = int(instruction.operands[-1][1:])
        read += [f'R{first + k}' for k in range(1, instruction.width // 4)]
    return [name for name in written if name not in ('PT', 'UPT')], read


def _next(name: str) -> str:
    kind, number = re.fullmatch(r'(U?R)(\d+)', name).groups()  # type: ignore[union-attr]
    return f'{kind}{int(number) + 1}'


def _results(instruction: Instruction) -> int:
    """How many registers hold the result."""
    base, name = instruction.base, instruction.name
    if base in _LOADS:
        return max(1, instruction.width // 4)
    if base == 'LDSM':
        return 4 if name.endswith('.4') else 2 if name.endswith('.2') else 1
    if base == 'HMMA':
        return 4
    return 2 if '.WIDE' in name or '.64' in name or (base == 'CS2R' and not name.endswith('.32')) else 1
