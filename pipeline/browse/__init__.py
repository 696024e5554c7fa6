"""The local web page of `foretell inspect serve`: a store and its runs, to see and to hear."""
