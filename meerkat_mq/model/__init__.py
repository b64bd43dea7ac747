"""torch + transformers: loading, mask scoring, the engine, tasks, data, evaluation, export.

`tasks` and `data` do not import torch, so that processes without a model can use them.
"""
