"""Remember what the modules of a network are and hold, to put it back."""
from torch import nn

__all__ = ['Snapshot']


class Snapshot:
    """Classes and attributes of all modules of a network, and which children, parameters, buffers and hooks they have.

    Values of tensors are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (module, type(module), {key: dict(value) if isinstance(value, dict) else value
                                    for key, value in vars(module).items()})
            for module in model.modules()]

    def undo(self, classes: bool = True) -> None:
        """Put it all back; without ``classes`` only in modules of the class that they had."""
        for module, kind, attributes in self._before:
            now = vars(module)
            if type(module) is not kind:
                if not classes:
                    continue
                module.__class__ = kind
            for key in now.keys() - attributes.keys():
                del now[key]
            for key, value in attributes.items():
                if isinstance(value, dict) and isinstance(now.get(key), dict):
                    now[key].clear()  # keep the dictionary: handles of hooks point to it
                    now[key].update(value)
                else:
                    now[key] = value
