"""A stand-in for the package brokerd, for tests of the library where only it is installed."""
