"""Gamma: image quality by the words that fit a picture, with experts beside the MLPs of a frozen CLIP."""
