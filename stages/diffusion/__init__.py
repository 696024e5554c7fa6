"""Diffusion and flow models: images instead of speech, noise levels instead of decoding steps."""
