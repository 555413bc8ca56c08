"""Shared by the inspections of all kinds of dictionaries: settings, saved parts, hidden states, common measurements."""
