"""Objects that sound: what is struck, how it looks, how it rings."""
