"""Begin to decode at a key frame, and know that it is the right one."""
from typing import Any, Container, Iterable, Iterator, Optional

from .decode import Video

__all__ = ['Lost', 'lands', 'seek']


class Lost(Exception):
    """The file does not lead to the frame that was looked for."""


def seek(
        video: Video,
        container: Any,
        stream: Any,
        target: int,
        pts: int,
        stamps: Optional[Container[int]] = None,
) -> Iterator[Any]:
    """The frames from a key frame on.

    Frames of an open group of pictures that are shown before its key frame are left out: they are predicted from the
    group before, too.

    Args:
        video: The file.
        container: It, opened.
        stream: The stream of it that is decoded.
        target: Time stamp to seek to.
        pts: Time stamp of presentation of the key frame.
        stamps: Time stamps of the frames that are needed. None needs all.

    Raises:
        Lost: The seek does not lead to this key frame, or a frame after it has no time stamp.
    """
    packets = _from(video, container, stream, target, pts)
    for frame in video.decode(stream, packets if stamps is None else needed(stream, packets, stamps)):
        if frame.pts is None:
            raise Lost(f'a frame after the key frame at {pts} has no time stamp')
        if frame.pts >= pts:
            yield frame


def needed(stream: Any, packets: Iterable[Any], stamps: Container[int]) -> Iterator[Any]:
    """Packets of a stream, while its decoder is told which of them it need not decode.

    In H.264 a frame says itself whether others are predicted from it. If not, and if its time stamp is none of those
    that are needed, it is not decoded. Other codecs say less, or their decoders skip more.
    """
    context = stream.codec_context
    can_skip = context.name == 'h264'
    for packet in packets:
        if can_skip:
            skip = packet is not None and packet.pts is not None and packet.pts not in stamps
            context.skip_frame = 'NONREF' if skip else 'DEFAULT'
        yield packet


def lands(video: Video, container: Any, stream: Any, target: int, pts: int) -> bool:
    """Whether the packet that comes after a seek is that of a key frame. Nothing is decoded."""
    try:
        next(_from(video, container, stream, target, pts))
    except Lost:
        return False
    return True


def _from(video: Video, container: Any, stream: Any, target: int, pts: int) -> Iterator[Any]:
    try:
        container.seek(target, stream=stream)
    except video.av.error.FFmpegError as error:
        raise Lost(f'no seek to {target}: {error.strerror}') from error
    packets = video.packets(container, stream)
    first = next(packets)
    if first is None or first.pts != pts or not first.is_keyframe:
        raise Lost(f'a seek to {target} does not lead to the key frame at {pts}')
    yield first
    yield from packets
