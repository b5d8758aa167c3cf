"""Training of the grapheme-to-phoneme networks. Start with `train_g2p`."""
