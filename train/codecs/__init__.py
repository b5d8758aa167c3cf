"""Training of the codecs: video VAE, audio VAE, vocoder. Start with `train_codec`."""
