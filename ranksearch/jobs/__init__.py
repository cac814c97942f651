"""A study as a job of a Ray cluster: what is sent there, and the job server that runs it."""
