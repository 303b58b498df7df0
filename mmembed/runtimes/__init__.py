"""Parts of mmembed that other programs load by name."""
