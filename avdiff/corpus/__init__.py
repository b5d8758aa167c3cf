"""The presenter corpus: drawn faces that speak and objects that sound, a function of
(seed, split, index).

May import media, phonetics and g2p. Start with `dataset`.
"""
