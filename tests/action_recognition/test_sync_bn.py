"""Two processes with synced norms are one of both their batches: in float64, where rounding cannot hide a fault."""
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_run import environment
from torch.nn.parallel import DistributedDataParallel

from examples.action_recognition.config import Config
from examples.action_recognition.model import build_model
from examples.action_recognition.sync_bn import sync_batch_norms

STEPS = 5
CONFIG = Config(model='cmr_resnet18', num_frames=4, dropout=0., model_args={
    'layers': [1, 1, 1, 1], 'channels': [8, 16, 16, 16], 'zero_init_last': False})


def network():
    torch.manual_seed(0)
    return build_model(CONFIG, 2).double().train()


def losses(network, model, part):
    """Losses and the last weights of a training on every second clip, or on all."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(STEPS, 4, 4, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (STEPS, 4), generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), .01, .9)
    found = []
    for x, y in zip(clips[:, part], labels[:, part]):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found), {key: value.clone() for key, value in network.state_dict().items()}


def train_half(rank, folder):
    """The command of a process: half of the clips. Writes losses and weights."""
    dist.init_process_group('gloo', f'file://{folder}/group', rank=rank, world_size=2)
    half = sync_batch_norms(network(), torch.device('cpu'))
    found, state = losses(half, DistributedDataParallel(half), slice(rank, None, 2))
    dist.all_reduce(found)
    torch.save((found / 2, state), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_are_as_one(tmp_path):
    # no fork: autograd refuses one once it has had threads
    halves = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment())
              for rank in range(2)]
    whole = network()
    want, state = losses(whole, whole, slice(None))
    for rank, half in enumerate(halves):
        assert half.wait(timeout=200) == 0
        found, weights = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        for key, value in state.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-9)


if __name__ == '__main__':
    train_half(int(sys.argv[1]), sys.argv[2])
