"""The layouts in which data sets of videos come, written with small real files."""
import csv
import json

import numpy as np
from videos import write_video

from cmr_layers.video.lists import LAYOUTS, read_videos

__all__ = ['CLASSES', 'LAYOUTS', 'write_layout']

CLASSES = ('Moving something down', 'Moving something up')


def _bar(up, phase):
    """Paint frame i of a bright bar that moves up or down: no frame alone tells which."""
    def paint(image, i):
        height = image.shape[0]
        at = (phase + (-3 if up else 3) * i) % height
        rows = (np.arange(at, at + 8)) % height
        image[:] = 40
        image[rows] = 220
    return paint


def _video(path, label, phase, frames=16, codec='libx264'):
    return write_video(path, [0] * frames, codec=codec, paint=_bar(label == 1, phase))


def write_layout(layout, folder, per_class=4, frames=16):
    """Write videos of the two classes and their list. Returns the arguments of read_videos."""
    root = folder / 'videos'
    root.mkdir(parents=True)
    names = [(label, i, f'{2 * i + label + 1}') for i in range(per_class) for label in (0, 1)]
    classes = None
    if layout == 'folders':
        for label, i, name in names:
            (root / CLASSES[label]).mkdir(exist_ok=True)
            _video(root / CLASSES[label] / f'{name}.mp4', label, 11 * i, frames)
        return layout, None, root, None
    file = folder / {'sthv2': 'list.json', 'kinetics': 'list.csv'}.get(layout, 'list.txt')
    if layout == 'list':
        for label, i, name in names:
            _video(root / f'{name}.mp4', label, 11 * i, frames)
        file.write_text(''.join(f'{name}.mp4, {CLASSES[label]}\n' for label, i, name in names))
    elif layout == 'sthv1':
        import av
        for label, i, name in names:
            video = _video(folder / f'{name}.mp4', label, 11 * i, frames)
            (root / name).mkdir()
            with av.open(str(video)) as container:
                for k, frame in enumerate(container.decode(video=0)):
                    frame.to_image().save(root / name / f'{k + 1:05d}.jpg', quality=95)
        file.write_text(''.join(f'{name};{CLASSES[label]}\n' for label, i, name in names))
        classes = folder / 'labels.csv'
        classes.write_text(''.join(f'{name}\n' for name in CLASSES))
    elif layout == 'sthv2':
        for label, i, name in names:
            _video(root / f'{name}.webm', label, 11 * i, frames, codec='libvpx-vp9')
        file.write_text(json.dumps([
            {'id': name, 'label': CLASSES[label].replace('something', 'a bar'), 'placeholders': ['a bar'],
             'template': CLASSES[label].replace('something', '[something]')} for label, i, name in names]))
        classes = folder / 'labels.json'
        classes.write_text(json.dumps({name: str(i) for i, name in enumerate(CLASSES)}))
    else:
        with open(file, 'w', newline='') as out:
            rows = csv.writer(out)
            rows.writerow(['label', 'youtube_id', 'time_start', 'time_end', 'split'])
            for label, i, name in names:
                _video(root / f'video{name}_000010_000020.mp4', label, 11 * i, frames)
                rows.writerow([CLASSES[label], f'video{name}', 10, 20, 'train'])
    return layout, file, root, classes


def read_layout(layout, folder, **kwargs):
    return read_videos(*write_layout(layout, folder, **kwargs))
