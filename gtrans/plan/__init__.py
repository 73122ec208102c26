"""The planner: which forward value reaches the backward, and how."""
