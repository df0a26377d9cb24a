"""Benchmarks; see README.md beside this file. Not a part of the installed package."""
