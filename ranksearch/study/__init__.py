"""What is remembered: the study, its folder and journal, what becomes of results, the front; and the loop that drives trials."""
