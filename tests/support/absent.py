"""A process in which importing PyTorch is an error."""

# Code that comes before all else; with PyTorch goes what is only needed beside it.
ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "safetensors", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
START = "import sys; sys.argv[0] = 'meerkat'; from meerkat_mq.__main__ import main; sys.exit(main())"
