"""Phones as symbols with ids, their visemes, and phoneme tracks on the clock.

May import the clock and files. Start with `phone`.
"""
