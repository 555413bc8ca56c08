"""RQAEs as feature sources: the reader, the source, and the encoding that its depths share."""
