"""Checkpoints of the authors' code, read without running anything and checked before they are used.

Their training script saves ``{'epoch', 'optimizer', 'model', 'best_prec1'}``. The learning rates in 'optimizer' are
numpy's numbers, which ``torch.load`` with ``weights_only=True`` refuses; see :func:`numpy_numbers`.
"""
import os
import pickle
import re
import stat
import zipfile
from typing import Any, BinaryIO, Dict, List, Mapping, Union

import torch
from torch import Tensor, nn

__all__ = [
    'check_fit', 'check_values', 'numpy_numbers', 'open_file', 'our_name', 'read', 'refusal', 'rename', 'state_dict_in',
]

Path = Union[str, 'os.PathLike[str]']


# Names in the file, without 'module.' and 'base_model.', and in the model.
_RENAMES = (
    (r'(layer\d\.\d+)\.net\.', r'\1.'),
    (r'\.trans_att\.conv1_reduce_k\.', '.cme.w1.'),
    (r'\.trans_att\.conv1_reduce_q\.', '.cme.w2.'),
    (r'\.trans_att\.conv_inflate\.', '.cme.w3.'),
    (r'\.shift_conv\.weight$', '.tim.weight'),
    (r'\.spatial_att\.W\.0\.', '.sme.conv.'),
    (r'\.spatial_att\.W\.1\.', '.sme.bn.'),
    (r'^new_fc\.', 'fc.'),
)
_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_INTEGERS = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64

# Other files that users take for a checkpoint: how they start, and what to do about them.
_OTHER_FILES = (
    (rb'(?i)(\xef\xbb\xbf)?\s*<(!doctype|!--|\?xml|html|head|body)',
     'it is a web page, as a failed download leaves one; download the checkpoint again'),
    (rb'\x1f\x8b', 'it is compressed; unpack it, and pass the checkpoint that is in it'),
    (rb'(?s).{257}ustar', 'it is a tar archive; unpack it, and pass the checkpoint that is in it'),
)


def _number(dtype: Any, data: Any = None) -> Any:
    """Do what ``numpy.core.multiarray.scalar`` does, but for numbers only: that function makes objects, too."""
    import numpy
    if isinstance(dtype, numpy.dtype) and dtype.kind in 'fi' and isinstance(data, bytes):
        if len(data) == dtype.itemsize:
            return numpy.frombuffer(data, dtype)[0]
    raise pickle.UnpicklingError(f'only numbers are allowed of numpy, got {dtype!r} of {data!r:.99}')


def numpy_numbers() -> List[Any]:
    """The globals that ``torch.load`` must allow to read float64, float32 and int64 numbers of NumPy 1 and 2.

    Returns:
        Globals for ``torch.serialization.add_safe_globals`` or ``safe_globals``. The list leaves out globals that are
        allowed already, as ``safe_globals`` would forbid them afterwards. It is empty without numpy.

    Example:
        >>> with torch.serialization.safe_globals(numpy_numbers()):
        ...     content = torch.load('ckpt.pth.tar', weights_only=True)  # doctest: +SKIP
    """
    try:
        import numpy
    except ImportError:
        return []
    allowed = [
        (_number, 'numpy.core.multiarray.scalar'),  # a name, as looking it up warns with NumPy 2
        (_number, 'numpy._core.multiarray.scalar'),
        numpy.dtype,
        *(type(numpy.dtype(name)) for name in ('float64', 'float32', 'int64')),
    ]
    known = torch.serialization.get_safe_globals()
    return [entry for entry in allowed if entry not in known]


def open_file(path: Path) -> BinaryIO:
    """Open a checkpoint for reading, if it is a file that could be a checkpoint.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a directory, a pipe, a device, empty, a web page or an archive, or a zip that unpacks to more
            than its size, which torch never writes.
    """
    file = open(path, 'rb', opener=_open_regular)
    try:
        size, start = os.fstat(file.fileno()).st_size, file.read(512)
        reasons = ['it is empty'] if not size else [
            reason for pattern, reason in _OTHER_FILES if re.match(pattern, start)]
        if _unpacked_size(file) > size:
            reasons.append('it unpacks to more than its size, which torch.save never writes')
        if reasons:
            raise ValueError(f'{os.fspath(path)!r} is no checkpoint: {reasons[0]}')
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))  # else opening a pipe waits for the other end
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f'{os.fspath(path)!r} is no checkpoint: it is no file, but a directory, a pipe or a device')
    return descriptor


def _unpacked_size(file: BinaryIO) -> int:
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no zip, or a broken one, which torch.load will refuse
        return 0


def read(path: Path) -> Any:
    """The content of a file as ``torch.load`` reads it, on the CPU. Nothing in the file is run.

    Args:
        path: The file, in torch's zip format or in the format before PyTorch 1.6.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or holds more than tensors, Python's own types and numpy's numbers.
    """
    with open_file(path) as file:
        try:
            with torch.serialization.safe_globals(numpy_numbers()):
                return torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error:  # the bytes can make torch.load raise anything
            raise refusal(path, error) from None  # torch's message advises to load without weights_only


def refusal(path: Path, error: BaseException) -> ValueError:
    """The error for a file that ``torch.load`` refuses. torch's own error advises to run the content."""
    found = re.search(r'GLOBAL (\S+)|Unsupported globals: ([^\s,]+[^\s,.])', str(error))
    reason = (
        f'it holds {found[1] or found[2]}, and only tensors, the types of Python and the numbers of numpy are '
        f'loaded, nothing that runs' if found else f'torch.load cannot read it ({type(error).__name__})')
    return ValueError(f'{os.fspath(path)!r} is no checkpoint of weights: {reason}')


def state_dict_in(content: Any) -> Mapping[Any, Any]:
    """The state dict of a checkpoint: the checkpoint itself, or its entry 'model' or 'state_dict'.

    Raises:
        ValueError: There is none.
    """
    for key in ('model', 'state_dict'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            "the checkpoint must hold a state dict, bare or under 'model' or 'state_dict'; got "
            f'{sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__}'
        )
    return content


def our_name(key: str) -> str:
    """Our name for a key of the authors, with or without DataParallel's 'module.'. Our own keys stay."""
    key = re.sub(r'^(module\.)?(base_model\.)?', '', key)
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def rename(state_dict: Mapping[Any, Any]) -> Dict[str, Tensor]:
    """Rename a checkpoint's keys to ours. TIM's taps lose their unit width.

    Args:
        state_dict: State dict with the authors' names, with or without DataParallel's 'module.'. Our names stay.

    Returns:
        A new dict with the same tensors.

    Raises:
        ValueError: A key is no string, two keys name the same parameter, or a value is no dense tensor of floating
            point numbers (integers for a counter of batches) that are all stored.
    """
    renamed: Dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(f'the keys of the checkpoint must be strings, got {key!r}')
        _check_tensor(key, value)
        name = our_name(key)
        if name in renamed:
            raise ValueError(f'the checkpoint names the same parameter twice: {key!r} is {name!r}')
        renamed[name] = value.squeeze(3) if name.endswith('.tim.weight') and value.ndim == 4 else value
    return renamed


def _check_tensor(key: str, value: Any) -> None:
    kinds = _INTEGERS if key.endswith('.num_batches_tracked') else _FLOATS
    wanted = 'an integer' if kinds is _INTEGERS else 'a dense tensor of floating point numbers'
    got = ''
    if type(value) not in (Tensor, nn.Parameter):
        got = type(value).__name__
    elif value.is_meta or value.is_nested or value.layout is not torch.strided:
        got = f'a tensor without values or of another layout ({value.device}, {value.layout})'
    elif value.dtype not in kinds or (kinds is _INTEGERS and value.numel() != 1):
        got = f'{value.dtype} of shape {list(value.shape)}'
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        # strides that repeat a few bytes could ask for any amount of memory
        got = f'shape {list(value.shape)} of {value.untyped_storage().nbytes()} bytes'
    if got:
        raise ValueError(f'{key!r} of the checkpoint must be {wanted}, got {got}')


def check_fit(state_dict: Dict[str, Tensor], wanted: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Add the counters of batches that PyTorch before 0.4.1 did not save, and check that the state dict fits.

    Args:
        state_dict: State dict with our names.
        wanted: The state dict of a network, on any device.

    Raises:
        ValueError: Keys are missing or unexpected, or have another shape. The message lists them.
    """
    counters = {key for key in wanted if key.endswith('.num_batches_tracked')}
    state_dict = {**{key: torch.tensor(0) for key in counters}, **state_dict}
    missing, unexpected = sorted(wanted.keys() - state_dict.keys()), sorted(state_dict.keys() - wanted.keys())
    sizes = [
        f'{key} is {list(state_dict[key].shape)}, must be {list(value.shape)}' for key, value in wanted.items()
        if key in state_dict and key not in counters and state_dict[key].shape != value.shape]
    if missing or unexpected or sizes:
        raise ValueError(
            f'the checkpoint does not fit the network as released. Missing keys: {missing}. Unexpected keys: '
            f'{unexpected}. Other shapes: {sizes}.'
        )
    return {key: value.reshape(()) if key in counters else value for key, value in state_dict.items()}


@torch.no_grad()
def check_values(state_dict: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a number is not finite in float32, or a variance or a counter is negative."""
    for key, value in state_dict.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f'{key!r} of the checkpoint must be finite numbers of float32, got NaN or infinite ones')
        if key.endswith(('.running_var', '.num_batches_tracked')) and (value < 0).any():
            raise ValueError(f'{key!r} of the checkpoint must not be negative, got {value.min().item()}')
