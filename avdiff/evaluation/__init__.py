"""Measurements of media files.

Reads files and evaluator networks, never a model that generates. Start with `suite`.
"""
