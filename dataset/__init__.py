"""Which images and which labels a step of a task sees."""
