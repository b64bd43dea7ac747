"""The engine without PyTorch: a bundle is run by ONNX Runtime (docs/onnx.md).

A bundle is made once, where PyTorch is (`bundle`, `families`, `graph`, and `quantise`). A node needs only the rest of
this folder, and imports neither torch, transformers nor onnx.
"""
