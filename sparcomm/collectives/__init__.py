"""Exchanges that several algorithms are made of."""
