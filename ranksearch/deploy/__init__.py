"""Nets that leave: formats of other programs and libraries, the runtimes that time them, and tables of times."""
