"""Files that appear whole or not at all."""
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Sequence

__all__ = ['staged']


@contextmanager
def staged(targets: Sequence[Path], force: bool = False) -> Iterator[Path]:
    """A folder to write the targets in, under their names. They are put in their places if the block ends well.

    Args:
        targets: Where the files shall be, all in one folder, which is made if needed. The first one is what a program
            opens; it is the last one to be put in its place.
        force: Replace targets that are there. Without an error in the block, that is.

    Raises:
        FileExistsError: A target is there, and ``force`` is not given.
        OSError: The folder is none, or nothing may be written there; or a target was not written.
    """
    place = targets[0].parent
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(f'--out: wanted a file, got the folder {str(target)!r}')
        if target.exists() and not force:
            raise FileExistsError(f'--out: {str(target)!r} exists; --force replaces it')
    made = not place.exists()
    place.mkdir(exist_ok=True)
    try:
        # on the disk of the targets, where we learn at once whether we may write
        with tempfile.TemporaryDirectory(prefix='.export-', dir=place) as folder:
            yield Path(folder)
            missing = [target.name for target in targets if not Path(folder, target.name).is_file()]
            if missing:
                raise FileNotFoundError(f'{missing} should have been written to {folder!r}')
            if len(targets) > 1:
                targets[0].unlink(missing_ok=True)  # an old one must never open new ones
            for target in reversed(targets):
                os.replace(Path(folder, target.name), target)
    finally:
        if made:
            with suppress(OSError):
                place.rmdir()  # if nothing came of it, the folder is empty
