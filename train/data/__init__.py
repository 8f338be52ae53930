"""Data sets that recipes name: one file each."""
