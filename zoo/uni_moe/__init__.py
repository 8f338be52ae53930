"""Uni-MoE: text, image, video, speech and sound into one mixture-of-experts language model."""
