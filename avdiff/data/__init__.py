"""Media files, clips, latent caches and the presenter corpus."""
