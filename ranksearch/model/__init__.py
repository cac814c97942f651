"""A model as the rest of the package sees it: what it takes, which of its layers can be lowered, what they cost, and a plan for them."""
