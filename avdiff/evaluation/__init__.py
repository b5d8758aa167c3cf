"""Measurements of media files: they read files and judges, never a model that generates."""
