"""Triton kernels of alignloss, installed and imported as `alignloss.kernels`.

Imports nothing of ours: torch and Triton; `state` and `blocks` do without Triton, since plain torch needs them too.

The bare name `kernels` belongs to Hugging Face's package. Where this folder is found first under that name (the root of
the repository is on `sys.path`), it steps aside for that package, and is an empty module without it.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _root = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir))
    _elsewhere = [path for path in sys.path if os.path.realpath(path or os.curdir) != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        _module = importlib.util.module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
