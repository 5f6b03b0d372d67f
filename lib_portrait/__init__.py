"""Portrait: real people in generated pictures. docs/architecture.md is the map of this package."""

__version__ = "0.1.0"
