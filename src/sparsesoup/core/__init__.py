"""What is sparse: masks, exact top-k, groups, schedules, tickets, and the files they live in."""
