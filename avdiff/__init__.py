"""avdiff: joint audio-video diffusion."""
