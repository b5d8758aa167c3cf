"""The diffusers-style pipeline: prompt and conditions in, a clip out. Start with `pipeline_av`."""
