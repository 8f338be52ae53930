"""Earth-Adapter: frequency adapters in a frozen vision transformer that segments pictures of the earth."""
