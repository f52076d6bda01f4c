"""The package's version, in a module that any layer may import."""

VERSION = "0.1.0"
