"""A run folder and real videos to evaluate: tiny, but with everything that a training leaves."""
import multiprocessing
import os
import socket
import traceback

import numpy as np
import torch
from helpers import randomize
from videos import write_video

from examples.action_recognition.checkpoint import save
from examples.action_recognition.config import Config
from examples.action_recognition.model import build_model

CLASSES = ('down', 'left', 'right')
TINY = {'layers': (1, 1, 1, 1), 'channels': (8, 8, 8, 8), 'stem_width': 8}


def moving(path, label, num_frames=12, size=(64, 48), seed=0):
    """A square that moves down, left or right over noise."""
    noise = np.random.default_rng(seed).integers(60, 90, (size[1], size[0], 3), dtype=np.uint8)

    def paint(image, i):
        image[:] = noise
        x, y = {0: (20, 2 * i), 1: (44 - 3 * i, 16), 2: (4 + 3 * i, 16)}[label]
        image[y:y + 16, x:x + 16] = 230

    return write_video(path, [0] * num_frames, size=size, paint=paint)


def write_run(folder, seed=0, **config):
    """The run folder of a network with random weights, all of them away from where they began."""
    folder.mkdir()
    config = Config(**{
        'model': 'cmr_resnet18', 'model_args': TINY, 'num_frames': 4, 'size': 32, 'short_side': 40, **config})
    torch.manual_seed(seed)
    model = randomize(build_model(config, len(CLASSES)), everything=True)
    save(folder / 'best.pt', {
        'state_dict': model.state_dict(), 'config': config.to_dict(), 'classes': list(CLASSES)})
    return folder


def write_list(folder, count=7):
    """A list of videos, two of each class and a broken one, and their paths."""
    paths = [moving(folder / f'{i}.mp4', i % 3, seed=i) for i in range(count - 1)]
    paths.append(folder / f'{count - 1}.mp4')
    paths[-1].write_bytes(b'no video' * 99)
    file = folder / 'videos.csv'
    file.write_text(''.join(f'{path.name}, {CLASSES[i % 3]}\n' for i, path in enumerate(paths)))
    return file


def _process(rank, port, function, queue):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    try:
        queue.put((rank, function(rank)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))


def by_two_processes(function):
    """What a function of the rank returns in two processes of torchrun's environment, or the text of its error."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('fork')  # a new interpreter would import torch for seconds
    queue = context.Queue()
    processes = [
        context.Process(target=_process, args=(rank, port, function, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    return [result for _, result in sorted(queue.get(timeout=100) for _ in processes)]
