"""Portrait: real people in generated pictures. The architecture section of the README is the map of this package."""

__version__ = "0.1.0"
