"""What is remembered: the study, its folder and its journal, what becomes of results, the front, and how trials are driven."""
