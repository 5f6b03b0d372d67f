"""One file a paper: its embedding module, its attention rule and its checkpoint layout."""
