"""A package, since nemo_text_processing installs another `tests`, which a folder gives way to."""
