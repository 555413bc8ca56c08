"""Small modules that know nothing of features: files, databases, the hub, progress, the event loop."""
