"""What the tests of videos share."""
import http.server
import sys
import threading

import pytest
from videos import LEVEL, write_video

av = pytest.importorskip('av')


@pytest.fixture
def clip30(tmp_path):
    return write_video(tmp_path / 'clip.mp4', range(0, 30 * LEVEL, LEVEL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with secret.mp4 in it."""
    monkeypatch.chdir(tmp_path)
    return write_video(tmp_path / 'secret.mp4', range(0, 10 * LEVEL, LEVEL)).parent


@pytest.fixture
def server():
    """A web server on this machine, and the requests it got."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    requests = []
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(.01,))
        thread.start()
        yield f'http://127.0.0.1:{running.server_port}', requests
        running.shutdown()
        thread.join()


@pytest.fixture
def opened(monkeypatch):
    """Paths that Python opens. What FFmpeg opens by itself is seen by its access time or its frames only."""
    paths, active = [], [True]

    def hook(event, args):
        if active[0] and event == 'open':
            paths.append(args[0])

    sys.addaudithook(hook)
    yield paths
    active[0] = False
