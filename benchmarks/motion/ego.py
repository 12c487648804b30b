"""Ego-motion in rendered rooms: how does the camera move?

ViZDoom renders 32 maps of textured rooms, headless. A clip is one movement of the camera, whose speed changes by less
than 40%; the other class of its pair is that clip backwards, so the reversal is exact. Test clips are of other maps.
The whole picture moves: this is where the paper's intuition, that the ground changes more slowly than what matters, has
nothing to offer. Nothing is said on cameras that shake, nor on things that move by themselves: there are none.
"""
import importlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.motion.paths import Levels
from benchmarks.motion.scene import SIDE
from benchmarks.motion.task import Clips, kept, make_task, pairs

__all__ = ['EGO', 'MAPS', 'record']

CLASSES = ('forwards', 'backwards', 'to the right', 'to the left', 'turn right', 'turn left', 'look up', 'look down')
SPEEDS = (10., 10., 4., 3.)  # of the four buttons, in their units for each tic
MAPS = {'train': range(1, 25), 'val': range(25, 33)}
CLIPS = {'train': 2400, 'val': 600}  # that are recorded, to be played both ways
TICS = 16  # of a clip, 1/35 s each
STOP, START = 20, 8  # tics between clips
LEAST = .4  # units, or degrees, of a tic
HEIGHT, WIDTH = 48, 64  # as stored, for frames of 40 pixels, which are windows of it


def _game(number: int) -> Any:
    try:
        vizdoom = importlib.import_module('vizdoom')
    except ImportError as error:
        raise ImportError('the task ego needs vizdoom: pip install "cmr-layers[motion]"') from error
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(Path(str(vizdoom.__file__)).with_name('freedoom2.wad')))
    # where it writes its settings; by itself, into the folder that it is run from
    game.set_doom_config_path(str(Path(tempfile.gettempdir()) / 'cmr-layers-vizdoom.ini'))
    game.set_doom_map(f'MAP{number:02}')
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for switch in ('window_visible', 'sound_enabled', 'render_hud', 'render_weapon', 'render_crosshair',
                   'render_messages'):
        getattr(game, f'set_{switch}')(False)
    game.set_available_buttons([getattr(vizdoom.Button, f'{name}_DELTA') for name in (
        'MOVE_FORWARD_BACKWARD', 'MOVE_LEFT_RIGHT', 'TURN_LEFT_RIGHT', 'LOOK_UP_DOWN')])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in (
        'POSITION_X', 'POSITION_Y', 'ANGLE', 'PITCH')])
    game.add_game_args('-nosound -nomonsters +sv_cheats 1')
    game.set_episode_timeout(0)
    game.set_seed(number)
    game.init()
    return game


def record(split: str, count: int, side: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Clips (count, TICS, 3, H, W) and which of the four movements each is."""
    random = np.random.default_rng((len(split), count))
    size = HEIGHT * side // SIDE, WIDTH * side // SIDE
    clips: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for i, number in enumerate(MAPS[split]):
        game = _game(number)
        wanted = count * (i + 1) // len(MAPS[split])
        tries = 0
        while len(clips) < wanted and tries < 40 * count:
            tries += 1
            wander = [random.uniform(0, 25), random.uniform(-10, 10), random.uniform(-8, 8), 0.]
            for _ in range(random.integers(5, 25)):
                game.make_action(wander)
            button = int(np.bincount(labels, minlength=4).argmin()) if labels else 0
            action = [0.] * 4
            action[button] = SPEEDS[button] * random.uniform(.7, 1.3) * (1 if button == 0 else random.choice((-1, 1)))
            game.make_action([0.] * 4, STOP)  # what is left of the way here
            game.make_action(action, START)  # Doom's things are slow to start
            if game.is_episode_finished() or game.is_player_dead():
                game.new_episode()
                continue
            frames, states = [], []
            for _ in range(TICS):
                frames.append(game.get_state().screen_buffer)
                states.append([game.get_game_variable(name) for name in game.get_available_game_variables()])
                game.make_action(action)
                if game.is_episode_finished():
                    break
            if button == 3:
                game.make_action([0., 0., 0., states[-1][3]])  # look ahead again: up lowers the pitch
            if len(frames) < TICS or not _moves(np.array(states), button, action[button]):
                continue
            tensor = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
            small = F.interpolate(tensor, size, mode='area').round().byte()
            clips.append((small.flip(0) if action[button] < 0 else small).numpy())
            labels.append(button)
        game.close()
    return np.stack(clips), np.array(labels)


def _moves(states: npt.NDArray[np.float64], button: int, action: float) -> bool:
    """Whether the camera does what the button says all the time: no wall stops or turns it, and no stop of its neck."""
    x, y, angle, pitch = states.T
    forwards = np.radians(angle[:-1])
    steps = {
        0: np.diff(x) * np.cos(forwards) + np.diff(y) * np.sin(forwards),
        1: np.diff(x) * np.sin(forwards) - np.diff(y) * np.cos(forwards),
        2: -((np.diff(angle) + 180) % 360 - 180), 3: -np.diff(pitch)}
    mine = steps[button] * np.sign(action)
    others = max(np.abs(steps[other]).max() for other in steps if other != button and (other < 2) == (button < 2))
    return bool(mine.min() > .6 * mine.max() > LEAST and others < .2 * mine.max())


@cache
def _recorded(split: str, side: int) -> tuple[Tensor, Tensor]:
    found = kept(f'ego-{split}-{side}', lambda: dict(zip(('clips', 'movements'), record(split, CLIPS[split], side))))
    return torch.from_numpy(found['clips']), torch.from_numpy(found['movements'])


def clips(
        count: int, seed: tuple[int, ...], split: str, num_frames: int, side: int, device: str = 'cpu',
) -> Clips:
    """Windows of recorded clips, forwards or backwards, in other light."""
    if TICS % num_frames:
        raise ValueError(f'num_frames must divide {TICS}, got {num_frames}')
    random = np.random.default_rng(seed)
    recorded, movements = _recorded(split, side)
    chosen = torch.from_numpy(random.integers(0, len(recorded), count))
    backwards = torch.from_numpy(random.integers(0, 2, count))
    tops = random.integers(0, recorded.shape[-2] - side + 1, count)
    lefts = random.integers(0, recorded.shape[-1] - side + 1, count)
    light = torch.from_numpy(random.uniform(.7, 1.2, (count, 1, 3, 1, 1)).astype(np.float32))
    parts = []
    for i, top, left, flip in zip(chosen.tolist(), tops, lefts, backwards.tolist()):
        part = recorded[i, ::TICS // num_frames, :, top:top + side, left:left + side]
        parts.append(part.flip(0) if flip else part)
    pictures = (torch.stack(parts) * light).clamp(0, 255).byte()
    return pictures.to(device), (movements[chosen] * 2 + backwards).to(device)


EGO = make_task('ego', CLASSES, pairs(len(CLASSES)), Levels(frame=1 / 2, frames=1 / 2), clips)
