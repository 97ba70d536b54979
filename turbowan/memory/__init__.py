"""Where weights live: the plan, and the one place that holds them."""
