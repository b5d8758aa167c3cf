"""The one training loop with its parts: data loader, optimizers, checkpoints, log.

Knows no modality. Start with `fit`.
"""
