"""What is proposed: the forms of a search, their groups, the first points, samplers, and the front without training. Writes nothing.

Calling the package is `search(space)`.
"""

from ranksearch._callable import make_callable

make_callable(__name__, "ranksearch.api:search")
