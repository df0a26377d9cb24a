"""Integrations with other libraries, each a module that is imported only where it is used."""
