"""What a flip does to labels: a video of a push to the left, mirrored, is one of a push to the right."""
import operator
import re
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

__all__ = ['FlipTable', 'check_table', 'flip_table', 'side_pairs']

FlipTable = Tuple[int, ...]  # label of the mirrored video, by label

# a word of its own, as in "push left", push_left and PushLeft, but not in "upright"; "right out" is no side
_SIDE = re.compile(
    r'(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))'
    r'(?i:left(?:wards?|most|hand(?:ed)?|side)?|right(?:wards?|most|hand(?:ed)?|side)?(?!\s+out\b)'
    r'|(?:(?:counter|anti)[-_ ]?)?clockwise)(?![a-z])')
_MIRRORED = {'<left>': '<right>', '<right>': '<left>', '<clockwise>': '<counter>', '<counter>': '<clockwise>'}


def flip_table(classes: Sequence[str], pairs: Optional[Iterable[Tuple[str, str]]] = None) -> FlipTable:
    """The label that each class has in a mirrored video.

    Without pairs no label changes, and so no class may name a side: left, right, clockwise and the like. With pairs,
    each class that names a side must be in one of them. A class that names a side but stays the same in the mirror is
    a pair with itself.

    Only names are looked at. That "swinging a tennis racket" is mostly done with the right hand, it does not know.

    Args:
        classes: Names by label.
        pairs: Names of the classes that take each other's place. None: no class does. For Something-Something, and
            others where two names differ by left and right only, :func:`side_pairs` finds them.

    Returns:
        Label of the mirrored video, by label.

    Raises:
        ValueError: A class names a side and is in no pair; a name in a pair is no class, or is in two of them; or
            without pairs, the names are mere numbers, so that nobody can see whether they mean a side.

    Example:
        >>> flip_table(['push left', 'push right', 'wave'], [('push left', 'push right')])
        (1, 0, 2)
        >>> flip_table(['jump', 'wave'])
        (0, 1)
    """
    labels = _labels(classes)
    table = list(range(len(labels)))
    if pairs is None:
        _check_words(labels)
        pairs, given = [], False
    else:
        given = True
    seen: Dict[str, Tuple[str, str]] = {}
    for pair in pairs:
        a, b = _pair(pair)
        for name in {a, b}:
            if name not in labels:
                raise ValueError(f'pairs={pair!r} has {name!r}, which is no class; wanted names of classes, such as '
                                 f'{_some(labels)}')
            if name in seen:
                raise ValueError(f'pairs has {name!r} twice, in {seen[name]!r} and in {pair!r}; wanted one pair')
            seen[name] = (a, b)
        table[labels[a]], table[labels[b]] = labels[b], labels[a]
    alone = [name for name in labels if _SIDE.search(name) and name not in seen]
    if alone:
        wanted = 'add them to pairs' if given else "wanted the pairs that take each other's place"
        raise ValueError(
            f'{len(alone)} of {len(labels)} classes name a side and are in no pair: {_some(alone)}; {wanted}: '
            f"flip_table(classes, pairs=[({alone[0]!r}, 'its name in the mirror')]), or pairs=side_pairs(classes) to "
            f'find them; a class that stays the same is a pair with itself')
    return tuple(table)


def side_pairs(classes: Sequence[str]) -> List[Tuple[str, str]]:
    """Pairs of classes whose names differ by left and right only, or by clockwise and counterclockwise.

    Upper and lower case do not matter, nor whether it is counterclockwise or anticlockwise. The words "right out", as
    in Something-Something's "pulling it right out", are no side.

    Args:
        classes: Names by label.

    Returns:
        Pairs for :func:`flip_table`, in the order of the labels.

    Raises:
        ValueError: A class names a side, and its mirrored name is no class; or the names are mere numbers.

    Example:
        >>> side_pairs(['Pushing something from left to right', 'Pushing something from right to left', 'Waving'])
        [('Pushing something from left to right', 'Pushing something from right to left')]
    """
    _check_words(classes)
    plain = {_plain(name): name for name in classes}
    pairs = []
    for name in _labels(classes):
        if not _SIDE.search(name):
            continue
        mirrored = re.sub('|'.join(_MIRRORED), lambda match: _MIRRORED[match[0]], _plain(name))
        if mirrored not in plain:
            raise ValueError(
                f'{name!r} names a side, but no class has its mirrored name; wanted that class, or the pairs given by '
                f'hand: flip_table(classes, pairs), with ({name!r}, {name!r}) if it stays the same')
        if (plain[mirrored], name) not in pairs:
            pairs.append((name, plain[mirrored]))
    return pairs


def _check_words(names: Iterable[str]) -> None:
    names = list(names)
    if all(name.isdecimal() for name in names):
        raise ValueError(
            f'classes are numbers ({_some(names)}), which do not tell whether a class means a side; wanted names, or '
            f'the pairs: flip_table(classes, pairs), pairs=[] if none')


def check_table(table: Any) -> FlipTable:
    """Return a table as ints, or raise a TypeError or a ValueError that says what it has to be."""
    wanted = 'wanted the table of flip_table(classes)'
    try:
        labels = tuple(operator.index(label) for label in table)
    except TypeError:
        raise TypeError(f'flip must be a table of labels, got {table!r:.99}; {wanted}') from None
    if any(not 0 <= label < len(labels) or labels[label] != i for i, label in enumerate(labels)):
        raise ValueError(f'flip must be a table that two flips undo, got {table!r:.99}; {wanted}')
    return labels


def _plain(name: str) -> str:
    """The name in small letters, with one spelling for each side."""
    def side(match: 're.Match[str]') -> str:
        word = match[0].lower()
        if word.endswith('clockwise'):
            return '<clockwise>' if word == 'clockwise' else '<counter>'
        # the rest, "ward" or "wards", has to agree
        return '<left>' + word[4:] if word.startswith('left') else '<right>' + word[5:]

    return _SIDE.sub(side, name).lower()


def _labels(classes: Sequence[str]) -> Dict[str, int]:
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f'classes must be names, got {classes!r:.99}')
    labels = {name: label for label, name in enumerate(classes)}
    if len(labels) < len(classes):
        twice = next(name for label, name in enumerate(classes) if labels[name] != label)
        raise ValueError(f'classes has two of the name {twice!r}; wanted different names')
    return labels


def _pair(pair: Any) -> Tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f'pairs must hold pairs of names of classes, got {pair!r}')
    return pair[0], pair[1]


def _some(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ', '.join(listed[:4]) + (f' and {len(listed) - 4} more' if len(listed) > 4 else '')
