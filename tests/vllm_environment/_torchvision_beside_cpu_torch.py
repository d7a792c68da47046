"""Lets a torchvision that was built for CUDA be imported beside a torch for the CPU; `make test-served` puts it there.

torchvision registers fakes of two operators that its CUDA library would have defined, and fails where nobody has. They
are defined, without a body, just before it is imported: what resizes images does not call them.
"""

import importlib.abc
import sys

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_KEPT = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        """Find nothing; define the operators when torchvision is looked for."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                library.define(operator)
            # An operator lasts as long as its library.
            _KEPT.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
