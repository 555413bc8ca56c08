"""Interoperation with eai-delphi: its explainer, judge and scorers as plug-ins, and its files."""
