"""Backbones that several families stand on, one file each; a family adds its experts to them."""
