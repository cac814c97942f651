"""Files, folders and URLs: where things are written and how they are reached. Loads no torch."""
