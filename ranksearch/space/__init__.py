"""What a user writes: the schema of a search space with every default, reading one, and a first one to begin with."""
