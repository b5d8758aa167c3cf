"""Grapheme to phoneme: text in eight languages to timed phones.

May import phonetics and models. Start with `pronounce`.
"""
