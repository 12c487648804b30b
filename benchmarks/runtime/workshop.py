"""Builds what is timed: with values as after training, placed, folded, compiled, captured."""
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.peers.gsm import GSM
from benchmarks.runtime.candidate import MODES, Candidate, Setting, takes
from benchmarks.runtime.graph import Sweep
from benchmarks.runtime.models import LAYERS, MODELS, OPERATORS
from cmr_layers import CME, TIM
from cmr_layers.deploy import fold, fuse_stages, graphed
from cmr_layers.ops import use_path

__all__ = ['TrainingStep', 'Workshop', 'build', 'precision', 'relative_error']

# Inputs of a single layer are so many that they don't all stay in a cache
CACHE_BYTES = 1.3e8

Run = Callable[[Tensor], Any]


def build(name: str, frames: int, width: float = 1) -> nn.Module:
    """A model of :data:`~benchmarks.runtime.models.MODELS` in eval mode, its values the same at every call.

    They are values as after training, where statistics and temporal weights are no defaults.
    """
    kwargs: dict[str, Any] = {}
    if width != 1:
        kwargs['channels'] = tuple(int(64 * 2 ** stage * width) for stage in range(4))
    torch.manual_seed(0)
    model = MODELS[name].build(num_frames=frames, **kwargs)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, _BatchNorm):
                m.weight.uniform_(.5, 1)
                m.bias.uniform_(-.5, .5)
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.uniform_(-.5, .5)
                m.running_var.uniform_(.5, 2)
            elif isinstance(m, CME):
                for p in m.parameters():
                    p.uniform_(-1.7, 1.7).div_(p[0].numel() ** .5)  # as trained ones; larger ones only round
            elif isinstance(m, TIM):
                m.weight.uniform_(-.7, .7)
            elif isinstance(m, GSM):
                m.gate.weight.normal_(std=.1)
    return model.eval()


def place(model: nn.Module, setting: Setting, dtype: torch.dtype) -> nn.Module:
    """Move a network there, in place."""
    model = model.to(setting.torch_device, dtype)
    if setting.layout == 'channels_last':
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for p in model.parameters():
            if p.ndim in formats:
                p.data = p.data.contiguous(memory_format=formats[p.ndim])
    return model


def clips(setting: Setting, count: int, dtype: torch.dtype, channels: int) -> list[Tensor]:
    """Frames (B*T, C, H, W), several batches of them; those inside of a network as a ReLU leaves them.

    They are drawn where they are used: a layer gets up to fifty million numbers, which a CPU takes seconds to draw.
    """
    generator = torch.Generator(setting.torch_device).manual_seed(0)
    shape = setting.batch * setting.frames, channels, setting.size, setting.size
    made = (torch.randn(shape, generator=generator, device=setting.torch_device) for _ in range(count))
    return [
        (x if channels == 3 else x.relu_()).to(dtype).contiguous(memory_format=setting.memory_format) for x in made]


# Networks folded on the host. With a GPU the host's time is the GPU's, too, and its memory is large.
_masters: dict[tuple[Any, ...], nn.Module] = {}


def _folded(c: Candidate) -> nn.Module:
    """A network with its batch norms folded, for a GPU with its stages fused, not yet placed or rounded."""
    one = c.setting._replace(device='cpu', batch=1)
    if takes(c.model, one._replace(size=64)):  # as much of a network is seen there, and sooner
        one = one._replace(size=min(one.size, 64))
    key = c.model, c.width, one.frames, one.size, one.layout
    if key in _masters:
        return copy.deepcopy(_masters[key])
    model = build(c.model, c.setting.frames, c.width)
    x = clips(one, 1, torch.float32, MODELS[c.model].in_channels)[0]
    fold(model, x)
    if c.setting.device == 'cuda':
        fuse_stages(model, x)
        _masters[key] = copy.deepcopy(model)
    return model


class Workshop:
    """Makes candidates. Networks are shared among those that do not change them."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def inputs(self, c: Candidate) -> list[Tensor]:
        """What to call a candidate with, in turn."""
        channels, operator = MODELS[c.model].in_channels, c.model in OPERATORS
        dtype = torch.float32 if c.training and not operator else c.setting.torch_dtype  # autocast, or not

        def make() -> list[Tensor]:
            size = math.prod((c.setting.batch, c.setting.frames, channels, c.setting.size ** 2, dtype.itemsize))
            count = 4 if channels == 3 else min(64, max(4, math.ceil(CACHE_BYTES / size)))
            with torch.inference_mode(not c.training):  # as CUDA graphs have them inside
                found = clips(c.setting, count, dtype, channels)
            return [x.requires_grad_() for x in found] if c.training and operator else found
        inputs: list[Tensor] = self._once(('inputs', c.setting, channels, c.training, dtype), make)
        return inputs

    def network(self, c: Candidate, folded: bool) -> nn.Module:
        """A network for inference, placed. Folding comes before rounding."""
        folded = folded and c.model not in OPERATORS  # which have nothing to fold

        def make() -> nn.Module:
            model = _folded(c) if folded else build(c.model, c.setting.frames, c.width)
            return place(model, c.setting, c.setting.torch_dtype)
        where = c.setting._replace(batch=0, size=0)  # which do not change it
        model: nn.Module = self._once(('network', c.model, c.width, where, folded), make)
        return model

    def truth(self, c: Candidate) -> list[Tensor]:
        """Results of the first clip on the reference path in float64, of weights that were not rounded."""
        def compute() -> list[Tensor]:
            model = place(build(c.model, c.setting.frames, c.width), c.setting, torch.float64)
            if c.training:  # the gradient of a weight is a sum over all clips
                x = self.inputs(c)[0].detach().double().requires_grad_()
                return list(self._gradients(c, model, 'reference')(x))
            x = self.inputs(c)[0][:c.setting.frames].double()
            with torch.inference_mode(), use_path('reference'):
                return [model(x)]
        found: list[Tensor] = self._once(('truth', c.model, c.setting, c.width, c.training), compute)
        return found

    def _gradients(self, c: Candidate, model: nn.Module, path: str) -> Callable[[Tensor], Sequence[Tensor]]:
        """The gradients of an operator's frames and weights, given a gradient of its results."""
        parameters = list(model.parameters())
        outgoing: list[Tensor] = []

        def run(x: Tensor) -> Sequence[Tensor]:
            with use_path(path):
                y = model(x)
                if not outgoing:
                    generator = torch.Generator(y.device).manual_seed(1)
                    gy = torch.randn(y.shape, generator=generator, device=y.device).to(c.setting.torch_dtype)
                    gy = gy.to(y.dtype)
                    outgoing.append(gy.contiguous(memory_format=c.setting.memory_format))
                return torch.autograd.grad(y, [x, *parameters], outgoing[0])
        return run

    def _compiled(self, c: Candidate) -> Any:
        """Compiled where it stands, by its first call; under the path."""
        mode = MODES[c.mode]

        def compile_() -> Any:
            # As an option it keeps the two kinds of graphs apart, which may take each other's place otherwise; as a
            # patch it reaches the tracer, which has to see constants where it sees inputs otherwise.
            options: Any = {'freezing': True} if mode.frozen else None
            model = torch.compile(self.network(c, True), dynamic=False, options=options)
            if not c.training:
                with torch._inductor.config.patch(freezing=mode.frozen), torch.inference_mode(), use_path(mode.path):
                    model(self.inputs(c)[0])
            return model
        return self._once(self._compiled_key(c), compile_)

    def _compiled_key(self, c: Candidate) -> tuple[Any, ...]:
        mode = MODES[c.mode]
        return 'compiled', c.model, c.setting, c.width, c.training, mode.path, mode.frozen

    def has_compiled(self, c: Candidate) -> bool:
        """Whether a graph has been compiled already that the candidate will only capture."""
        return self._compiled_key(c) in self.made

    def run(self, c: Candidate) -> Run:
        """What to time: from frames to logits, or a training step, or from frames to gradients."""
        mode = MODES[c.mode]
        if c.training and c.model not in OPERATORS:
            model = build(c.model, c.setting.frames, c.width)
            return TrainingStep(model, c.setting, mode.path)
        with precision(c.setting), use_path(mode.path):
            model = self._compiled(c) if mode.compiled else self.network(c, mode.folded)
            if mode.graph and c.model in LAYERS:
                return Sweep(model, self.inputs(c))
            if mode.graph:
                model = graphed(model, self.inputs(c)[0])  # type: ignore[assignment]
        if c.training:
            return _precisely(self._gradients(c, model, mode.path), c.setting)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode(), use_path(mode.path):
                y: Tensor = model(x)
                return y
        return _precisely(run, c.setting)


class TrainingStep:
    """Forward pass, loss, backward pass and SGD. Weights are float32; another data type is autocast's."""

    def __init__(self, model: nn.Module, setting: Setting, path: str) -> None:
        self.model, self.setting, self.path = place(model, setting, torch.float32).train(), setting, path
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learned, lr=1e-4, momentum=.9)
        self.target = torch.arange(setting.batch, device=setting.torch_device)

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.setting.torch_dtype
        with precision(self.setting), use_path(self.path):
            with torch.autocast(self.setting.device, dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(self.model(x), self.target)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # so that what is in use between steps is no gradient
        return loss

    def held_bytes(self) -> int:
        """Of weights, statistics and the optimizer's state, which are there between steps."""
        state = [t for held in self.optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *state))


class precision:
    """Within it, float32 products may or may not be of TF32, as the setting's data type says. CUDA only."""

    def __init__(self, setting: Setting) -> None:
        self.allow = setting.dtype == 'tf32' if setting.dtype in ('fp32', 'tf32') else None

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        if self.allow is not None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.allow

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.before


def _precisely(run: Run, setting: Setting) -> Run:
    if setting.device == 'cpu' or setting.dtype not in ('fp32', 'tf32'):
        return run

    def call(x: Tensor) -> Any:
        with precision(setting):
            return run(x)
    return call


def relative_error(tensors: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Largest difference from the truth, in units of its largest value; of several tensors, the worst.

    Raises:
        FloatingPointError: A tensor is not finite. A NaN would compare as small as anything.
    """
    errors = [
        float((got.to(want) - want).abs().max() / want.abs().max().clamp_min(1e-300))
        for got, want in zip(tensors, truth, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise FloatingPointError(f'the results are not finite: relative errors {errors}')
    return max(errors)
