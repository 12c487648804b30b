"""Networks as the benchmarks time them: with values as after training, placed, folded, compiled, captured."""
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks import timing
from benchmarks.peers.gsm import GSM
from cmr_layers import CME, TIM
from cmr_layers.deploy import graphed
from cmr_layers.ops import use_path

__all__ = ['COMPILED', 'MODES', 'Setting', 'Workshop', 'fold', 'trained', 'trainer']

# What can be done to a network, where
MODES = {
    'cpu': ('eager', 'folded', 'compiled', 'frozen'),
    'cuda': ('eager', 'folded', 'graph', 'compiled', 'compiled-graph'),
}
COMPILED = ('compiled', 'frozen', 'compiled-graph')
_GRAPHS = ('graph', 'compiled-graph')


def trained(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with values as after training, where statistics and temporal weights are no defaults, in eval mode.

    Args:
        make: Builds it.
        seed: Of all values.
    """
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, _BatchNorm):
                m.weight.uniform_(.5, 1)
                m.bias.uniform_(-.5, .5)
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.uniform_(-.5, .5)
                m.running_var.uniform_(.5, 2)
            elif isinstance(m, (CME, TIM)):
                for p in m.parameters():
                    p.uniform_(-.7, .7)
            elif isinstance(m, GSM):
                m.gate.weight.normal_(std=.1)
    return model.eval()


def fold(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy, in which every batch norm that gets what a convolution returns is part of that convolution.

    Which those are is seen in a run on the meta device; that nobody else reads what the convolution returns is not
    seen, and has to be compared. Networks of this package are folded by timm's ``reparameterize_model``, as their users
    do it; what it leaves is folded likewise.

    Args:
        model: A network in eval mode.
        x: What it takes; only the shape counts.
    """
    model = reparameterize_model(model)
    for conv_name, norm_name in _followed(model, x):
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        _replace(model, conv_name, fuse_conv_bn_eval(conv, norm))
        _replace(model, norm_name, nn.Identity().eval())
    return model


def _followed(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms behind them, both called once."""
    model = copy.deepcopy(model).to('meta', torch.float32)
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}

    def note_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            outputs[id(y)] = name, y, y._version  # the tensor too: a number of a dead one is given out again
        return hook

    def note_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            found = outputs.get(id(args[0]))
            if found is not None and found[2] == args[0]._version:  # nothing in place has come between
                pairs.append((found[0], name))
        return hook

    for name, m in model.named_modules():
        if isinstance(m, _ConvNd):
            m.register_forward_hook(note_output(name))
        elif isinstance(m, _BatchNorm):
            m.register_forward_pre_hook(note_input(name))
    with torch.no_grad(), use_path('reference'):
        model(x.to('meta', torch.float32))
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)


class Setting(NamedTuple):
    """Where a network is measured, and on what."""
    device: str
    dtype: str
    batch: int
    size: int
    layout: str
    frames: int = 8

    @classmethod
    def of(cls, entry: dict[str, Any]) -> 'Setting':
        """That of a result, which holds the fields among others."""
        return cls(**{field: entry[field] for field in cls._fields if field in entry})

    @property
    def label(self) -> str:
        return f'{self.device}, {self.dtype}, batch {self.batch}, {self.frames}x{self.size}x{self.size}, {self.layout}'

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == 'tf32' else timing.DTYPES[self.dtype]

    def place(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of a network, there."""
        model = copy.deepcopy(model).to(self.device, dtype or self.torch_dtype)
        if self.layout == 'channels_last':
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            for p in model.parameters():
                if p.ndim in formats:
                    p.data = p.data.contiguous(memory_format=formats[p.ndim])
        return model

    def inputs(self, count: int, dtype: torch.dtype | None = None, channels: int = 3) -> list[Tensor]:
        """Frames (B*T, C, H, W), several batches of them."""
        generator = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.layout == 'channels_last' else torch.contiguous_format
        return [
            torch.randn(self.batch * self.frames, channels, self.size, self.size, generator=generator)
            .to(self.device, dtype or self.torch_dtype).contiguous(memory_format=layout)
            for _ in range(count)]


class Workshop:
    """Makes the candidates of a setting. Networks are shared among the modes that do not change them.

    Args:
        setting: Where.
        build: From a name to a network of frames in float32 on the CPU.
        x: What the candidates will be called with: its shape counts, and for a captured graph its memory.
    """

    def __init__(self, setting: Setting, build: Callable[[str], nn.Module], x: Tensor) -> None:
        self.setting, self.build, self.x = setting, build, x
        self.made: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def network(self, name: str, folded: bool) -> nn.Module:
        """A network, placed. Folding comes before rounding."""
        base = self._once((name,), lambda: self.build(name))
        model: nn.Module = self._once(
            (name, 'folded' if folded else 'eager'), lambda: self.setting.place(fold(base, self.x) if folded else base))
        return model

    def truth(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """Logits on the reference path, of the weights before they are rounded."""
        def compute() -> Tensor:
            self.network(name, False)
            model = self.setting.place(self.made[name,], dtype)
            with torch.inference_mode(), use_path('reference'):
                y: Tensor = model(self.x.to(dtype))
            return y
        logits: Tensor = self._once((name, 'truth'), compute)
        return logits

    def compiled(self, name: str, path: str, frozen: bool) -> Any:
        """Compiled where it stands, by its first call; under the path."""
        def compile_() -> Any:
            # As an option it keeps the two kinds of graphs apart, which may take each other's place otherwise; as a
            # patch it reaches the tracer, which has to see constants where it sees inputs otherwise.
            options: Any = {'freezing': True} if frozen else None
            model = torch.compile(self.network(name, True), dynamic=False, options=options)
            with torch._inductor.config.patch(freezing=frozen), torch.inference_mode(), use_path(path):
                model(self.x)
            return model
        return self._once((name, path, 'frozen' if frozen else 'compiled'), compile_)

    def has_compiled(self, name: str, path: str) -> bool:
        return (name, path, 'compiled') in self.made

    def candidate(self, name: str, path: str, mode: str) -> Callable[[Tensor], Tensor]:
        """A function from frames to logits."""
        with use_path(path):
            if mode in COMPILED:
                model = self.compiled(name, path, mode == 'frozen')
            else:
                model = self.network(name, mode != 'eager')
            if mode in _GRAPHS:
                model = graphed(model, self.x)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode(), use_path(path):
                y: Tensor = model(x)
                return y
        return run


def trainer(setting: Setting, model: nn.Module, path: str) -> tuple[
        Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], list[Tensor]]:
    """A training step in two forms, forward and backward pass alone and with SGD's step, and the parameters.

    Weights are float32; another data type is autocast's.
    """
    model = setting.place(model, torch.float32).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=.9)
    target = torch.arange(setting.batch, device=setting.device)
    dtype = setting.torch_dtype

    def forward_backward(x: Tensor) -> Tensor:
        with use_path(path):
            with torch.autocast(setting.device, dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(model(x), target)
            loss.backward()
        return loss

    def step(x: Tensor) -> Tensor:
        loss = forward_backward(x)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # so that what is in use between steps is no gradient
        return loss
    return forward_backward, step, list(model.parameters())
