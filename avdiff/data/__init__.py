"""Clips of a user's folder, latent caches and checks.

May import the corpus, media and evaluators. Start with `clips` and `cache`.
"""
