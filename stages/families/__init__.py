"""Model families; only `load_family` imports them."""
