"""The package's version, for all that may not import the package itself."""

VERSION = "0.1.0"
