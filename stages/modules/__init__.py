"""Building blocks of networks, free of any model."""
