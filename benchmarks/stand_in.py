"""Stand-ins for torchvision and pytorch_fid, which two of the compared packages import, but which
nothing here calls. PyPI's torchvision needs a CUDA torch and does not import beside a CPU one."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

NAMES = ("torchvision", "torchvision.transforms", "torchvision.utils")
NAMES += ("pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception")


def install():
    """Put a stand-in in place of each package that cannot be imported; return their names."""
    replaced = []
    for name in NAMES:
        try:
            importlib.import_module(name)
        except Exception:  # a CUDA build fails with RuntimeError, a missing one with ImportError
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
            replaced.append(name)
    return replaced
