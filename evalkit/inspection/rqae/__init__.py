"""Measurements of an RQAE."""
