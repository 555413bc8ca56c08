"""Small parts with no knowledge of features: files, databases, progress, the event loop."""
