"""CLIP-MoE: a CLIP whose feed-forward blocks are upcycled into experts that learned from different clusters of data."""
