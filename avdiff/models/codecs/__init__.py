"""Autoencoders of picture and sound: video VAE, audio VAE, mel front end and vocoder.

May import the core. Start with `video_vae`.
"""
