"""Working beside eai-delphi: its own parts, and its files."""
