"""Whether a machine, or every node of a cluster, is ready for a study: facts that each tells of itself, and what is wrong with them."""
