"""A process that is forked after a video was read must not wait for threads that only its parent has."""
import gc
import os
import time

import pytest
from videos import write_video

from cmr_layers.video import read_clip
from cmr_layers.video.frames import read_frames
from cmr_layers.video.index import index_videos


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='Windows does not fork')
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.parametrize('read', [
    lambda path: index_videos([path], progress=False), lambda path: read_frames(path, [1, 5]), read_clip,
], ids=['index_videos', 'read_frames', 'read_clip'])
def test_forked_process_collects_what_was_read(tmp_path, read):
    path = str(write_video(tmp_path / 'a.mp4', range(8)))
    gc.disable()  # so that the frames are left to the forked process, as happens by chance
    try:
        read(path)
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail('the forked process hangs')
