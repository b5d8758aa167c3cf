"""Drawn presenters: who they are, how they move, how they look."""
