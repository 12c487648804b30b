"""Turn the frames of a video into the clip that a model takes."""
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from ..checks import check_module, check_positive

__all__ = ['ClipTransform', 'check_frames']

_Config = Dict[str, Any]


class ClipTransform:
    """Turns the frames of a video into the clip that a model takes: short side to 256, centre crop of 224.

    The paper tests like this.

    Args:
        model: The model, which may be wrapped (``torch.compile``, DDP, EMA, ``nn.Sequential``, :class:`ClipModel`). The
            transform takes mean, standard deviation and interpolation from the timm model in it. Without one it takes
            ImageNet's.
        size: Height and width of the crop. The short side is resized to 256/224 of it.
        mean: Mean of each channel of an image in [0, 1]. None takes the model's.
        std: Standard deviation, likewise.

    Shapes:
        uint8 (T, 3, H, W) to float32 (1, T, 3, size, size).

    Raises:
        ValueError: size is no positive int, or model holds timm models that need different clips and mean and std are
            not both given. At call time: frames are not uint8 (T, 3, H, W).
        TypeError: model is no module.

    Example:
        >>> import timm, cmr_layers
        >>> transform = ClipTransform(timm.create_model('cmr_resnet18', num_frames=4))
        >>> transform(torch.zeros(4, 3, 120, 160, dtype=torch.uint8)).shape
        torch.Size([1, 4, 3, 224, 224])
    """

    def __init__(
            self,
            model: Optional[nn.Module] = None,
            size: int = 224,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
    ) -> None:
        from torchvision.transforms import InterpolationMode, v2

        check_positive('size', size)
        if model is not None:
            check_module('model', model)
        # to timm, None means not given
        config = resolve_data_config({'mean': mean, 'std': std}, pretrained_cfg=_config(model, mean, std))
        self.size, self.mean, self.std = size, config['mean'], config['std']
        self._crop = v2.Compose([
            v2.Resize(round(size * 256 / 224), InterpolationMode(config['interpolation']), antialias=True),
            v2.CenterCrop(size),
        ])
        self._normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)])

    def crop(self, frames: Tensor) -> Tensor:
        """Resize and crop only: uint8 (T, 3, H, W) to uint8 (T, 3, size, size), the images that the model will see."""
        check_frames(frames)
        cropped: Tensor = self._crop(frames)
        return cropped

    def __call__(self, frames: Tensor) -> Tensor:
        clip: Tensor = self._normalise(self.crop(frames))
        return clip.unsqueeze(0)


def check_frames(frames: Any) -> None:
    """Raise a ValueError that says what was received if frames are not uint8 (T, 3, H, W)."""
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        got = f'{frames.dtype} {list(frames.shape)}' if isinstance(frames, Tensor) else type(frames).__name__
        hint = '; pass its frames' if hasattr(frames, 'frames') else ''
        raise ValueError(f'frames must be uint8 of shape (T, 3, H, W), got {got}{hint}')
    if 0 in frames.shape:
        raise ValueError(f'frames must not be empty, got shape {list(frames.shape)}')


def _config(model: Optional[nn.Module], mean: Optional[Sequence[float]], std: Optional[Sequence[float]]) -> _Config:
    """timm's description of the model, or of the models that it wraps."""
    configs = [] if model is None else list(_configs(model))
    wanted = {tuple(str(config.get(key)) for key in ('mean', 'std', 'interpolation')): config for config in configs}
    if len(wanted) > 1 and (mean is None or std is None):
        raise ValueError(
            f'model ({type(model).__name__}) holds {len(wanted)} timm models that disagree: '
            + ' and '.join(f'mean={a}, std={b}, interpolation={c}' for a, b, c in wanted)
            + '; give mean= and std=')
    return configs[0] if configs else {}


def _configs(module: nn.Module) -> Iterator[_Config]:
    """The outermost descriptions: of a model, but not of the backbones in it."""
    for name in ('pretrained_cfg', 'default_cfg'):
        config = getattr(module, name, None)
        if isinstance(config, dict) and config:
            yield config
            return
    for child in module.children():
        yield from _configs(child)
