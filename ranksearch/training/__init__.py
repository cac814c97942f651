"""How a net is trained and scored: the loop, its arithmetic, steps as CUDA graphs, a teacher, and dense nets to start from."""
