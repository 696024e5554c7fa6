"""Command line, configuration and assembly: what turns stages into runs."""
