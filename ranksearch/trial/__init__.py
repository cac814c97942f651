"""What a worker runs: the method (`trial.py`, read it first) and what its statements are made of. A trial knows no study."""
