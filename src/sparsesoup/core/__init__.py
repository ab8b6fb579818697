"""Sparsity: masks, exact top-k, groups, schedules, tickets, and the files that hold them."""
