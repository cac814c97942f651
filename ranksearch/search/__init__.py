"""The search: the space's schema, the parametrization, `trial.py` (read it first), the study, and how it is run.

Calling the package is `search(space)`.
"""

from ranksearch._callable import make_callable

make_callable(__name__, "ranksearch.api:search")
