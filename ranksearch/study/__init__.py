"""What is remembered: the study, what is proposed to it and what becomes of results; the loop that drives trials, and what follows it."""
