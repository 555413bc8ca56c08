"""Scorers: each builds a test of an explanation, asks a judge and compares the answers with the labels. One file each."""
