"""What measurements of SAEs and RQAEs share."""
