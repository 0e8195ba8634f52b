"""What `alignloss train` and `alignloss score` are made of: rows, settings, the trainer, its checkpoints, its log.

Imports `alignloss.trl`, hf, modules, losses and recipes, and optional packages.
"""
