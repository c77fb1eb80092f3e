"""``moa demo``: several methods on the embedded task, in one table and one picture."""
