"""Triton kernels of alignloss, installed and imported as `alignloss.kernels`.

The bare name `kernels` belongs to Hugging Face's package. When this folder is found first under that name (the
repository root is on `sys.path`), it steps aside for the other package.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _root = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir))
    _elsewhere = [path for path in sys.path if os.path.realpath(path or os.curdir) != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError("No module named 'kernels' (alignloss's own are alignloss.kernels)", name="kernels")
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["kernels"] = _module
    _spec.loader.exec_module(_module)
